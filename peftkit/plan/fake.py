"""Models without memory: every parameter a fake tensor, quantized layers in the shapes that bitsandbytes gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers.pytorch_utils import Conv1D

from peftkit.plan.shapes import ShapeMode

BLOCK = 64
"""Weights that share a scale in NF4."""
NESTED_BLOCK = 256
"""Scales that share a scale with double quantization."""


@contextmanager
def fake_tensors(*, masked: bool) -> Iterator[FakeTensorMode]:
    """Tensors made inside have shapes, dtypes and storages, and no memory.

    Args:
        masked: attention masks are built as for batches with padding; transformers would build them for any fake batch.
    """
    mode = ShapeMode()
    with (
        mode,
        patch("transformers.masking_utils.is_tracing", lambda tensor=None: masked),
        patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
        patch.object(nn.Module, "_apply", _apply),
        patch.object(torch, "get_rng_state", lambda: None),
        patch.object(torch, "set_rng_state", lambda state: None),
    ):
        yield mode


def materialize(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model on the meta device fake tensors: parameters in `dtype`, buffers in their own; ties stay."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                key = id(parameter)
                if key not in made:
                    made[key] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
                module._parameters[name] = made[key]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def quantize_linears(model: nn.Module, dtype: torch.dtype, *, nested: bool, skip: tuple[str, ...] = ()) -> None:
    """Put bitsandbytes' 4-bit layers, packed, in the place of the body's linear layers; output layers stay.

    Args:
        dtype: that products compute in.
        nested: double quantization.
        skip: further modules that stay, with all inside them.
    """
    _count_packed_products()
    output = model.get_output_embeddings()  # type: ignore[operator]
    for path, module in list(model.named_modules()):
        if is_packable(module) and module is not output and path.split(".")[0] not in skip:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _packed_linear(module, dtype, nested=nested))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT chooses its layers by


def is_packable(module: nn.Module) -> bool:
    """Whether transformers puts a packed layer in this one's place: a linear one, or GPT-2's transposed kind."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _count_packed_products() -> None:
    """Let torch count the work of bitsandbytes' products with packed weights as that of plain ones."""
    import_module("bitsandbytes")  # registers the operator
    if torch.ops.bitsandbytes.gemm_4bit not in flop_registry:
        register_flop_formula(torch.ops.bitsandbytes.gemm_4bit)(_packed_product_flops)


def _packed_product_flops(
    inputs: Sequence[int], packed: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Of inputs [..., K] and a weight [M, K]."""
    return 2 * math.prod(inputs) * weight[0]


def _packed_linear(linear: Any, dtype: torch.dtype, *, nested: bool) -> nn.Module:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    shape = torch.Size(reversed(linear.weight.shape)) if isinstance(linear, Conv1D) else linear.weight.shape
    loaded = torch.empty(shape, dtype=dtype)
    blocks = math.ceil(shape.numel() / BLOCK)
    absmax: Tensor = torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    inner = None
    if nested:
        inner = QuantState(
            absmax=torch.empty(math.ceil(blocks / NESTED_BLOCK)),
            code=torch.empty(256),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    weight: Any = nn.Parameter(torch.empty(math.ceil(shape.numel() / 2), 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        absmax=absmax,
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=torch.empty(16),
        quant_type="nf4",
        offset=torch.empty(()) if nested else None,
        state2=inner,
    )
    weight.compress_statistics, weight.quant_type = nested, "nf4"
    weight.quant_storage, weight.bnb_quantized = torch.uint8, True
    del loaded  # lives while it is being packed
    # built by hand: its constructor wraps the weight in a class that fake tensors cannot take
    packed: Any = Linear4bit.__new__(Linear4bit)
    nn.Module.__init__(packed)
    packed.compute_dtype, packed.compute_type_is_set = dtype, True
    packed.quant_storage, packed.support_avx512bf16_for_cpu = torch.uint8, False
    packed.out_features, packed.in_features = shape
    packed.register_parameter("weight", weight)
    packed.register_parameter("bias", linear.bias)
    packed.quant_state = weight.quant_state
    return packed  # type: ignore[no-any-return]


def _apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that puts new parameters in place: swapping the insides of fake tensors is refused."""
    shared: dict[int, list[tuple[nn.Module, str]]] = {}
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            shared.setdefault(id(parameter), []).append((inner, name))

    def visit(inner: nn.Module) -> None:
        for child in inner.children() if recurse else ():
            visit(child)
        for parameter in [*inner._parameters.values()]:
            if parameter is not None:
                changed = fn(parameter.data)
                if changed is not parameter.data and changed.dtype != parameter.dtype:
                    made = nn.Parameter(changed, parameter.requires_grad)
                    for holder, name in shared[id(parameter)]:  # tied ones stay tied
                        holder._parameters[name] = made
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = fn(buffer)

    visit(module)
    return module
