"""Between the base's storage and float32: what quantized weights stand for, and one rounding back.

Rounding to nearest loses a delta that is small beside the spacing of a narrow dtype: the base's weights lie on its
grid, and W + delta falls back to W. Three steps of bfloat16 LoRA on SmolLM2-135M keep 45 % of their effect that way,
and the merge is ten times further from the adapter than it need be. Where that happens, a tensor is rounded
stochastically instead, up or down with the probability that makes the mean exact (Gupta et al. 2015, arXiv:1502.02551):
the noise is that of any rounding, and the delta survives in the sum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.backbones.spec import Quantization

KEPT_SHARE = 0.02
"""How far from 1 the share of the delta that survives rounding to nearest may be."""
SEED = 1502_02551
"""Of the dither. Not one that models are initialised with: the same stream would make the two depend on each other."""
CHUNK = 2**18
"""Numbers rounded at a time: few enough to stay in a core's cache from one pass over them to the next."""
SAMPLED = 4
"""The share that survives is taken of every fourth of these; of a tensor that is no longer than one, of all."""

Part = Callable[[int], Tensor]
"""Gives a tensor's numbers, flat and in float32, from a place on: `CHUNK` of them, or those that are left. They are
good until it is called again."""


def dequantize(model: nn.Module) -> dict[str, Tensor]:
    """The weights that quantized linear layers stand for, in float32, by module path.

    Call before any forward: bitsandbytes repacks its codes then.
    """
    import bitsandbytes as bnb

    weights: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weights[path] = _dequantize_nf4(module.weight)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weights[path] = bnb.functional.int8_vectorwise_dequant(module.weight.data, scale).float()
    return weights


def through_codes(weight: Tensor, quantization: Quantization) -> Tensor:
    """What a weight [O, I] in its dtype stands for, in float32, once a quantized layer has taken it as loading does."""
    import bitsandbytes as bnb

    if quantization == "nf4":
        return _dequantize_nf4(
            bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
        )
    if quantization == "int8":
        held = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
        dense: Tensor = bnb.functional.int8_vectorwise_dequant(held.CB, held.SCB).float()
        return dense
    return weight.float()


def quantize(weight: Tensor, name: str) -> dict[str, Tensor]:
    """A weight [O, I] in NF4, as the tensors by which transformers stores a quantized layer."""
    import bitsandbytes as bnb

    held = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = held.quant_state.as_dict(packed=True)
    return {name: held.data, **{f"{name}.{key}": tensor for key, tensor in state.items()}}


def _dequantize_nf4(weight: Any) -> Tensor:
    import bitsandbytes as bnb

    state = weight.quant_state
    narrow, state.dtype = state.dtype, torch.float32
    dense: Tensor = bnb.functional.dequantize_4bit(weight.data, state)
    state.dtype = narrow
    return dense


def to_float32(model: Any) -> Any:
    """The same model computing in float32, quantized layers included; its codes stay what they are."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.weight.quant_state.dtype = torch.float32
            module.support_avx512bf16_for_cpu = False  # its repacked kernel multiplies in bfloat16
    return nn.Module.float(model)


def snapshot(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the parameters that lie on the grid of a narrow `dtype`; nothing for float32."""
    if dtype == torch.float32:
        return {}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == dtype}


def round_parameters(model: nn.Module, dtype: torch.dtype, base: Mapping[str, Tensor]) -> int:
    """Round every parameter to `dtype`, once; returns how many were rounded stochastically. Buffers stay: rotary
    frequencies are computed in float32, not stored.

    Args:
        base: `snapshot` of the weights before the fold.
    """
    dithered = 0
    for name, parameter in model.named_parameters():
        parameter.data, dither = round_once(parameter.data, dtype, base.get(name), name)
        dithered += dither
    return dithered


def round_once(exact: Tensor, dtype: torch.dtype, base: Tensor | None, name: str) -> tuple[Tensor, bool]:
    """`exact`, float32, in `dtype`; and whether it was rounded stochastically because its delta would be lost.

    Args:
        base: what it was before the fold, where that lies on the grid of a narrow `dtype`; else None.
        name: of the parameter; its dither depends on nothing else, in whatever order parameters come.
    """
    rounded = torch.empty(exact.shape, dtype=dtype, device=exact.device)
    flat = exact.reshape(-1)
    return rounded, round_into(rounded, lambda at: flat[at : at + CHUNK], base, name)


def round_into(rounded: Tensor, exact: Part, base: Tensor | None, name: str) -> bool:
    """Round `exact` into `rounded`, which may be `base` itself: `round_once` for what need not be in memory whole."""
    flat = rounded.view(-1)
    generator = None
    if base is not None and not _survives(exact, rounded.dtype, base.reshape(-1)):
        generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    for at in range(0, flat.numel(), CHUNK):
        part = exact(at)
        if generator is not None:
            part = round_stochastically(part, rounded.dtype, generator)
        flat[at : at + CHUNK] = part
    return generator is not None


def _survives(exact: Part, dtype: torch.dtype, base: Tensor) -> bool:
    """Whether the delta on top of `base`, flat, survives rounding to nearest."""
    kept = power = 0.0
    for at in range(0, base.numel(), SAMPLED * CHUNK):
        part, before = exact(at), base[at : at + CHUNK].float()
        delta = part - before
        power += float(delta.dot(delta))
        kept += float((part.to(dtype).float() - before).dot(delta))
    return power == 0.0 or not math.isfinite(power) or abs(kept / power - 1) <= KEPT_SHARE


def round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to `dtype`, to either neighbour, with mean `exact`; what `dtype` holds exactly stays."""
    if dtype == torch.bfloat16:  # the upper half of a float32: add noise below, then cut
        draws = torch.empty(-(-exact.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        noise = draws.view(torch.int16)[: exact.numel()].reshape(exact.shape).to(exact.device, torch.int32)
        noise.bitwise_and_(0xFFFF).add_(exact.view(torch.int32)).bitwise_and_(-(2**16))
        return noise.view(torch.float32).to(dtype)
    nearest = exact.to(dtype)
    shift = torch.rand(exact.shape, generator=generator).to(exact.device) - 0.5
    return torch.where(nearest.float() == exact, nearest, (exact + shift * spacing(exact, dtype)).to(dtype))


def spacing(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far apart the neighbours of each number are in `dtype`."""
    limits = torch.finfo(dtype)
    steps = torch.ldexp(torch.full_like(exact, limits.eps), torch.frexp(exact).exponent - 1)
    return steps.clamp(min=limits.smallest_normal * limits.eps)
