"""A backbone's dimensions: plain numbers read off a `config.json`, so that counting needs no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftkit.backbones.spec import Head

LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer: its path in the model, and `out_features x in_features` weights."""

    path: str
    in_features: int
    out_features: int
    bias: bool

    @property
    def leaf(self) -> str:
        """The last word of the path, which is what adapter configs usually name."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """The index of the block it belongs to; None for poolers and heads."""
        found = LAYER_INDEX.search(self.path)
        return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Dims:
    """Everything a method needs to count what it would train.

    Attributes:
        num_params: parameters of the model with its head, tied ones once.
        linears: the linear layers that can be adapted; the head and output embedding are not among them.
        module_params: parameters held by each module path, children included.
        head_modules: modules of a new task head, outside the body; empty for the language-model head.
        head: the head these dimensions were read with.
        config: the transformers configuration the numbers were read from.
    """

    model_type: str
    family: Literal["encoder", "decoder"]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int | None
    num_params: int
    linears: tuple[Linear, ...]
    module_params: dict[str, int]
    head_modules: tuple[str, ...]
    head: Head
    config: Any

    @property
    def head_params(self) -> int:
        """Parameters of a new task head; 0 for a language model."""
        return sum(self.module_params[name] for name in self.head_modules)

    def saved_params(self, names: Iterable[str]) -> int:
        """Parameters of the modules that `names` match by path or by last words, none counted twice."""
        matched = {path for path in self.module_params for name in names if path == name or path.endswith("." + name)}
        outer = {path for path in matched if not any(path.startswith(other + ".") for other in matched)}
        return sum(self.module_params[path] for path in outer)


def read_dims(config: Any, skeleton: Any, head: Head) -> Dims:
    """Read the dimensions of `skeleton`, a model built on the meta device from `config`."""
    from torch import nn

    body = skeleton.base_model_prefix
    text = config.get_text_config()
    outer = {name for name, module in skeleton.named_children() if name != body and [*module.parameters()]}
    output = skeleton.get_output_embeddings()
    linears = [
        Linear(path, module.in_features, module.out_features, module.bias is not None)
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and module is not output and path.split(".")[0] not in outer
    ]
    heads = text.num_attention_heads
    return Dims(
        model_type=config.model_type,
        family="decoder" if _is_causal(skeleton, config) else "encoder",
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        num_params=sum(parameter.numel() for parameter in skeleton.parameters()),
        linears=tuple(linears),
        module_params={
            path: sum(parameter.numel() for parameter in module.parameters())
            for path, module in skeleton.named_modules()
            if path
        },
        head_modules=tuple(sorted(outer)) if head.kind == "classification" else (),
        head=head,
        config=config,
    )


def _is_causal(skeleton: Any, config: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return causal and (not masked or bool(getattr(config, "is_decoder", False)))


def select_layers(dims: Dims, layers: str | Sequence[int]) -> tuple[int, ...]:
    """The block indices that `all`, `top-N` or a list names.

    Raises:
        ValueError: an index beyond the backbone's blocks.
    """
    if layers == "all":
        return tuple(range(dims.layers))
    if isinstance(layers, str):
        count = int(layers.removeprefix("top-"))
        if count > dims.layers:
            raise ValueError(f"layers={layers} but the backbone has {dims.layers} layers")
        return tuple(range(dims.layers - count, dims.layers))
    beyond = [index for index in layers if not 0 <= index < dims.layers]
    if beyond:
        raise ValueError(f"layers names {beyond} but the backbone's layers are 0 to {dims.layers - 1}")
    return tuple(layers)
