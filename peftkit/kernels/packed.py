"""One forward of a model over a batch, packed or padded, whatever virtual tokens the adapter puts in front.

Shapes: N packed tokens, B examples, P virtual tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftkit.kernels.layouts import DECODERS, ENCODERS, model_type
from peftkit.kernels.segments import Segments

VIRTUAL_EMBEDDINGS = frozenset({"PROMPT_TUNING", "P_TUNING"})
VIRTUAL_KEYS = frozenset({"PREFIX_TUNING"})


def packing_trouble(model: Any, *, attention: str) -> str | None:
    """Why examples cannot lie end to end in this model, in words; None when they can."""
    kind = model_type(model)
    if kind not in DECODERS and kind not in ENCODERS:
        return f"the architecture {kind!r} is not known to the packed forward"
    if attention != "auto":
        return f"backbone.attention={attention} attends over padded batches"
    virtual = _virtual_kind(model)
    if virtual is not None and virtual not in VIRTUAL_EMBEDDINGS | VIRTUAL_KEYS:
        return f"the adapter {virtual} shapes its own input"
    return None


def run_packed(model: Any, input_ids: Tensor, segments: Segments, *, token_type_ids: Tensor | None = None) -> Tensor:
    """Logits of examples that lie end to end: [1, N + B P, ...] of a decoder, [B, ...] of a pooling encoder.

    The model must be under `attention.packed_attention`.

    Args:
        input_ids: [1, N].
        token_type_ids: [1, N]; virtual tokens leave no room for them, as in PEFT's own forward.
    """
    virtual = _virtual_kind(model)
    layout = ENCODERS.get(model_type(model))
    first = 0 if layout is None else layout.first_position(model)
    called: Any = model
    inputs: dict[str, Any] = {"segments": segments}
    if virtual is None:
        inputs |= {"input_ids": input_ids, "position_ids": segments.positions(first=first)}
        inputs |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    else:
        called = model.get_base_model()
        prompt = model.get_prompt(batch_size=1)
        if virtual in VIRTUAL_KEYS:
            layers: Sequence[Any] = prompt.layers
            inputs["prefix"] = [(layer.keys, layer.values) for layer in layers]
            count = int(layers[0].keys.shape[2])
            inputs |= {"input_ids": input_ids, "position_ids": segments.positions(first=first + count)}
        else:
            embeds, segments = _with_virtual(called.get_input_embeddings()(input_ids), prompt[0], segments)
            inputs |= {"inputs_embeds": embeds, "position_ids": segments.positions(first=first), "segments": segments}
    if layout is None:
        logits: Tensor = called(**inputs, use_cache=False).logits
        return logits
    pooling = called.get_submodule(layout.pooling)
    handle = pooling.register_forward_pre_hook(lambda module, args: (_first_rows(args[0], segments), *args[1:]))
    try:
        pooled: Tensor = called(**inputs).logits
        return pooled
    finally:
        handle.remove()


def _virtual_kind(model: Any) -> str | None:
    """PEFT's name of the adapter's type when it puts virtual tokens in front; None otherwise."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None
    return str(model.active_peft_config.peft_type.value)


def _with_virtual(embeds_1NH: Tensor, prompt_PH: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """The virtual tokens in front of every example: [1, N + B P, H]."""
    prompt_PH = prompt_PH.to(embeds_1NH.dtype)
    parts: list[Tensor] = []
    for own in torch.split(embeds_1NH[0], list(segments.lengths)):
        parts += (prompt_PH, own)
    lengths = [length + prompt_PH.shape[0] for length in segments.lengths]
    return torch.cat(parts)[None], Segments.of(lengths).to(embeds_1NH.device)


def _first_rows(hidden_1NH: Tensor, segments: Segments) -> Tensor:
    """Each example's first row, as an encoder pools it: [B, 1, H]."""
    return hidden_1NH[0].index_select(0, segments.starts())[:, None]


def real_rows(hidden_1NH: Tensor, lengths: Sequence[int]) -> Tensor:
    """The rows of real tokens, virtual ones in front of each example left out: [1, N, H]."""
    rows, real = hidden_1NH.shape[1], sum(lengths)
    if rows == real:
        return hidden_1NH
    virtual = (rows - real) // len(lengths)
    starts = np.cumsum([0, *lengths[:-1]]) + virtual * np.arange(1, len(lengths) + 1)
    kept = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    return hidden_1NH.index_select(1, torch.from_numpy(kept).to(hidden_1NH.device))
