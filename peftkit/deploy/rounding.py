"""Between the base's storage and float32: what quantized weights stand for, and one rounding back.

Rounding to nearest loses a delta that is small beside the spacing of a narrow dtype: the base's weights lie on its
grid, and W + delta falls back to W. Three steps of bfloat16 LoRA on SmolLM2-135M keep 45 % of their effect that way,
and the merge is ten times further from the adapter than it need be. Where that happens, a tensor is rounded
stochastically instead, up or down with the probability that makes the mean exact (Gupta et al. 2015, arXiv:1502.02551):
the noise is that of any rounding, and the delta survives in the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEPT_SHARE = 0.02
"""How far from 1 the share of the delta that survives rounding to nearest may be."""
SEED = 1502_02551
"""Of the dither. Not one that models are initialised with: the same stream would make the two depend on each other."""


def dequantize(model: nn.Module) -> dict[str, Tensor]:
    """The weights that quantized linear layers stand for, in float32, by module path.

    Call before any forward: bitsandbytes repacks its codes then.
    """
    import bitsandbytes as bnb

    weights: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            narrow, state.dtype = state.dtype, torch.float32
            weights[path] = bnb.functional.dequantize_4bit(module.weight.data, state)
            state.dtype = narrow
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weights[path] = bnb.functional.int8_vectorwise_dequant(module.weight.data, scale).float()
    return weights


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
    generator = torch.Generator().manual_seed(SEED)
    dithered = 0
    for name, parameter in model.named_parameters():
        nearest = parameter.data.to(dtype)
        if name in base and _loses_delta(parameter.data, nearest, base[name]):
            nearest = round_stochastically(parameter.data, dtype, generator)
            dithered += 1
        parameter.data = nearest
    return dithered


def round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to `dtype`, to either neighbour, with mean `exact`; what `dtype` holds exactly stays."""
    nearest = exact.to(dtype)
    limits = torch.finfo(dtype)
    spacing = torch.ldexp(torch.full_like(exact, limits.eps), torch.frexp(exact).exponent - 1)
    spacing = spacing.clamp(min=limits.smallest_normal * limits.eps)
    shift = torch.rand(exact.shape, generator=generator).to(exact.device) - 0.5
    return torch.where(nearest.float() == exact, nearest, (exact + shift * spacing).to(dtype))


def _loses_delta(exact: Tensor, nearest: Tensor, base: Tensor) -> bool:
    delta = exact - base.float()
    power = float(delta.square().sum())
    if power == 0.0 or not bool(delta.isfinite().all()):
        return False
    kept = float(((nearest.float() - base.float()) * delta).sum()) / power
    return abs(kept - 1) > KEPT_SHARE
