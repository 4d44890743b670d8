"""Which architectures can be written as GGUF, what llama.cpp wants to know of each, and how it lays out their tensors.

llama.cpp computes a fixed graph for each architecture: what a configuration may say beyond it is refused here, since
the engine would ignore it and answer differently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import BackboneError

GELU_TANH = frozenset({"gelu_new", "gelu_pytorch_tanh", "gelu_fast"})
SILU = frozenset({"silu", "swish"})
NOT_WEIGHTS = ("rotary_emb.inv_freq", ".masked_bias")
_QUERY_OR_KEY = re.compile(r"\.self_attn\.(q|k)_proj\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class Layout:
    """How llama.cpp sees one architecture of transformers.

    Attributes:
        arch: its name in GGUF.
        activations: what the engine computes in the feed-forward layers.
        interleaved: it rotates neighbouring rows of q and k where transformers rotates the two halves of a head.
        shifted_norms: it multiplies by a norm's weight where transformers multiplies by 1 + weight.
        global_every: it attends in a window in all layers but each so-many-th; 0 where it knows no window.
        always_tied: it has no output head besides the embedding.
    """

    arch: str
    activations: frozenset[str] = SILU
    interleaved: bool = False
    shifted_norms: bool = False
    global_every: int = 0
    always_tied: bool = False


LAYOUTS: dict[str, Layout] = {
    "LlamaForCausalLM": Layout("llama", interleaved=True),
    "MistralForCausalLM": Layout("llama", interleaved=True),
    "Qwen2ForCausalLM": Layout("qwen2"),
    "Qwen3ForCausalLM": Layout("qwen3"),
    "GemmaForCausalLM": Layout("gemma", GELU_TANH, shifted_norms=True, always_tied=True),
    "Gemma2ForCausalLM": Layout("gemma2", GELU_TANH, shifted_norms=True, global_every=2, always_tied=True),
    "Gemma3ForCausalLM": Layout("gemma3", GELU_TANH, shifted_norms=True, global_every=6, always_tied=True),
    "PhiForCausalLM": Layout("phi2", GELU_TANH),
    "Phi3ForCausalLM": Layout("phi3"),
}
"""Every architecture that can be written, by its class in transformers."""


def find_layout(config: Any, name: str) -> Layout:
    """The layout of a model's architecture.

    Raises:
        BackboneError: it is none of `LAYOUTS`, or the engine would ignore something that its configuration asks for.
    """
    written = (config.architectures or ["an architecture that it does not name"])[0]
    layout = LAYOUTS.get(written)
    if layout is None:
        raise BackboneError(
            f"{name} is {written}, which peftkit does not write as GGUF. Supported: {', '.join(sorted(LAYOUTS))}. "
            "An encoder or classifier goes with --to onnx; other models need llama.cpp's own convert_hf_to_gguf.py."
        )
    faults = list(_faults(layout, config))
    if faults:
        raise BackboneError(
            f"{name} cannot be written as GGUF, because llama.cpp computes {layout.arch} in one way: "
            f"{'; '.join(faults)}. It would answer differently. Serve it with transformers or vLLM."
        )
    return layout


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return int(config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)


def describe_architecture(writer: Any, layout: Layout, config: Any, rows: int) -> list[str]:
    """Write what the engine must know of the architecture; returns what a user should know, in words.

    Args:
        rows: of the embedding.
    """
    content, notes = config.to_dict(), []
    context, window = int(config.max_position_embeddings), _window(config)
    if window and not layout.global_every and layout.arch != "phi3":
        notes.append(f"llama.cpp has no sliding window for {layout.arch}: the context is limited to the {window} of it")
        context = min(context, window)
    writer.add_vocab_size(rows)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(content.get("num_key_value_heads") or config.num_attention_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    if layout.arch == "phi2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if layout.arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if layout.global_every or layout.arch == "phi3":
        writer.add_sliding_window(window)
    _describe_rotation(writer, layout, config)
    return notes


def place(layout: Layout, config: Any, name: str, tensor: Tensor) -> Tensor:
    """A tensor of transformers, of that name, as the engine wants it; the shape stays.

    A LoRA's B, [out, rank], is placed like the weight that it is added to.
    """
    found = _QUERY_OR_KEY.search(name)
    if layout.interleaved and found:
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        half = tensor.shape[0] // heads // 2
        return tensor.reshape(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if layout.shifted_norms and name.endswith("norm.weight"):
        return tensor.float() + 1
    return tensor


def is_left_out(config: Any, name: str) -> bool:
    """Whether the engine wants no such tensor: buffers, and a head that is the embedding."""
    return name.endswith(NOT_WEIGHTS) or (name == "lm_head.weight" and bool(config.tie_word_embeddings))


def rotation_factors(layout: Layout, config: Any) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies, [head_dim / 2] float32, for scalings that are not one number."""
    rope = rotation(config)
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].float()
        width = head_dim(config)
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        return {"rope_freqs.weight": plain / scaled}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    return {}


def rotation(config: Any) -> Mapping[str, Any]:
    """The rotary settings: of the global layers, where the local ones have their own."""
    content: Mapping[str, Any] = config.rope_parameters
    return content.get("full_attention") or content


def _describe_rotation(writer: Any, layout: Layout, config: Any) -> None:
    import gguf

    rope = rotation(config)
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if layout.arch == "phi3":
        first = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(first)
        if kind == "longrope":
            stretch = config.max_position_embeddings / first
            factor = math.sqrt(1 + math.log(stretch) / math.log(first)) if stretch > 1 else 1.0
            writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or factor)


def _window(config: Any) -> int:
    """Length of the sliding window that some layers attend in; 0 where none does."""
    content = config.to_dict()
    window = content.get("sliding_window")
    kinds = content.get("layer_types")
    unused = content.get("use_sliding_window") is False or (kinds and "sliding_attention" not in kinds)
    return 0 if window is None or unused else int(window)


def _faults(layout: Layout, config: Any) -> Iterator[str]:
    """What the configuration asks for and the engine would ignore."""
    content = config.to_dict()
    activation = content.get("hidden_activation") or content.get("hidden_act")
    if activation not in layout.activations:
        yield f"its activation is {activation}, not {' or '.join(sorted(layout.activations))}"
    if layout.always_tied and not content.get("tie_word_embeddings", True):
        yield "its output head is not its embedding"
    yield from _rotation_faults(layout, config)
    if layout.arch == "gemma2" and not (content["attn_logit_softcapping"] and content["final_logit_softcapping"]):
        yield "its logits are not capped"
    if layout.arch == "gemma3" and (content["attn_logit_softcapping"] or content["final_logit_softcapping"]):
        yield "its logits are capped"
    if layout.arch == "phi2" and content.get("qk_layernorm"):
        yield "it normalises queries and keys (qk_layernorm)"
    if layout.arch == "qwen3" and content.get("attention_bias"):
        yield "its attention has biases"
    if layout.global_every:
        kinds = [
            "full_attention" if (index + 1) % layout.global_every == 0 else "sliding_attention"
            for index in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != kinds:
            yield f"its layers do not alternate as each {layout.global_every}th global and the others local"
        scale = config.query_pre_attn_scalar
        large = {"gemma2": 46, "gemma3": 62}[layout.arch]  # the 27B models scale by the mean width instead
        expected = config.hidden_size / config.num_attention_heads if config.num_hidden_layers == large else None
        if scale != (expected or head_dim(config)):
            yield f"it scales queries by 1/sqrt({scale}), not by the width of a head"


def _rotation_faults(layout: Layout, config: Any) -> Iterator[str]:
    rope = rotation(config)
    kind = rope["rope_type"]
    known = {"default", "linear", "yarn"} | {"llama": {"llama3"}, "phi3": {"longrope"}}.get(layout.arch, set())
    if kind not in known:
        yield f"its rotary scaling is {kind}, not one of {', '.join(sorted(known))}"
    if kind == "yarn" and ("attention_factor" in rope or "mscale" in rope):
        yield "its yarn scaling names its own attention factor"
    local = config.rope_parameters.get("sliding_attention")
    if layout.arch == "gemma3" and local and (local["rope_theta"] != 10000.0 or local["rope_type"] != "default"):
        yield "its local layers do not rotate by the base 10000"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and layout.arch not in ("phi2", "phi3"):
        yield "it rotates only a part of each head"
