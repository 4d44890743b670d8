"""What rounding can explain: how far a model that was folded, and rounded once, may be from its adapter.

Shapes: N scored positions, V outputs (the vocabulary, or a head's classes).

**From dtype and depth.** A weight rounded once to a dtype of unit roundoff u (half its machine epsilon) is wrong by a
share of at most u, and so is what its matrix gives. Each of L layers chains four matrices (value and output, up and
down) whose errors are independent, so that the last hidden state, and with it the logits, is off by about u sqrt(4 L)
of its size. Float32 arithmetic, on either side, adds u32 sqrt(K) a matrix for dot products of at most K terms in
another order:

    r = sqrt(4 L) (u + u32 sqrt(2 K)) x rms logit       R = 4 r
    largest difference  <= R sqrt(2 ln(N V))     the expected largest of N V normal values of deviation R
    mean KL             <= R^2 / 2               KL = Var(difference) / 2 to second order
    top-1 agreement     >= 100 % for float32, 99 % for narrower dtypes, where swaps of two outputs that the adapter
                           itself holds closer together than r count as agreement (they are reported)
    gain within 1 +- max(1/4, 3 r / (rms effect x sqrt(N)))

The 4 stands for what this leaves out: growth through attention and normalisation, and a base and a delta that nearly
cancel (OLoRA). Correct merges of twelve methods differ by 0.1 to 1.1 r. The gain is how much of the adapter's effect on
the bare base the merged model has: 1 + <difference, effect> / <effect, effect>. The errors of an unbiased rounding are
blind to the effect's direction, so that a delta that was lost (0), doubled (2) or misscaled shows even where it is
smaller than R.

**From the model itself.** In narrow dtypes the bounds above are wide: u is the worst rounding of any number, and the
logits' size has much in it that softmax does not see. So the very same noise is measured: every weight that the adapter
changes is moved by a random part of its spacing, up to half of it either way, in the model that was read back, and the
same questions are asked once more. How far these answers are from those just given is what one rounding of these
weights does to this model: c on average, m at most, k in nats. A second rounding differs from the first by no more than
chance, while KL goes with the square of the size:

    r <= 2 c            largest difference <= 3 m            mean KL <= 9 k

The narrower bound holds. Weights that were quantized again are moved by up to half a mean gap of NF4's levels instead,
and the top-1 agreement may be off by three times what that costs. Nothing that the fold did wrong enters all this: the
noise is drawn around whatever is on disk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.backbones.dims import Dims
from peftkit.deploy.answers import Difference, Reference
from peftkit.deploy.rounding import dequantize, spacing
from peftkit.record import Part

MIN_TOP1_ROUNDED = 0.99
GROWTH = 4
NF4_BLOCK, NF4_ROUNDOFF = 64, 1 / 15
"""Numbers that share a scale, and half the mean gap of the sixteen levels from -1 to 1."""
TIMES_MEASURED = 3
CONTROL_POSITIONS = 256
"""Positions at which the noise of one rounding is measured."""
SEED = 41


class Tolerance(Part):
    """What rounding can explain; see the module's docstring for the derivation. `one_rounding` is what was measured."""

    unit_roundoff: float
    chained_matrices: int
    longest_dot_product: int
    compared_logits: int
    rms_logit: float
    one_rounding: Difference | None = None
    rms_difference: float
    gain: float
    max_abs_logit: float
    mean_kl: float
    top1_agreement: float


def derive_tolerance(
    dtype: torch.dtype, dims: Dims, reference: Reference, noise: Difference | None, *, requantized: bool = False
) -> Tolerance:
    """The bounds for this dtype, depth and logit scale.

    Args:
        noise: what one more rounding does to the model; None where the first bounds are narrow already.
        requantized: whether that rounding was to NF4.
    """
    unit = NF4_ROUNDOFF if requantized else torch.finfo(dtype).eps / 2
    depth = 4 * dims.layers
    longest = max(linear.in_features for linear in dims.linears)
    finite = [part[part.isfinite()].double() for part in reference.logits]
    entries = sum(part.numel() for part in finite)
    rms = math.sqrt(sum(float(part.square().sum()) for part in finite) / max(entries, 1))
    spread = rms * math.sqrt(depth) * (unit + torch.finfo(torch.float32).eps / 2 * math.sqrt(2 * longest))
    largest = GROWTH * spread * math.sqrt(2 * math.log(max(entries, 2)))
    kl = (GROWTH * spread) ** 2 / 2
    if noise is not None and noise.rms_logit and noise.max_abs_logit:
        spread = min(spread, 2 * noise.rms_logit)
        largest = min(largest, TIMES_MEASURED * noise.max_abs_logit)
        kl = min(kl, TIMES_MEASURED**2 * noise.mean_kl) if noise.mean_kl else kl
    effect = (reference.base.rms_logit if reference.base else None) or 0.0
    positions = reference.base.positions if reference.base else 1
    return Tolerance(
        unit_roundoff=unit,
        chained_matrices=depth,
        longest_dot_product=longest,
        compared_logits=entries,
        rms_logit=rms,
        one_rounding=noise,
        rms_difference=spread,
        gain=max(0.25, 3 * spread / (effect * math.sqrt(positions))) if effect else 0.25,
        max_abs_logit=largest,
        mean_kl=kl,
        top1_agreement=_least_agreement(dtype, noise if requantized else None),
    )


def _least_agreement(dtype: torch.dtype, noise: Difference | None) -> float:
    if noise is not None and noise.top1_agreement is not None:
        return max(0.0, 1 - TIMES_MEASURED * (1 - noise.top1_agreement))
    return 1.0 if dtype == torch.float32 else MIN_TOP1_ROUNDED


def judge(found: Difference, tolerance: Tolerance) -> list[str]:
    """Every bound that does not hold, in words."""
    failures = []
    if found.non_finite:
        failures.append(f"{found.non_finite} of {found.positions} positions have logits that are not finite")
    if found.max_abs_logit is None or found.rms_logit is None:
        return failures
    if found.max_abs_logit > tolerance.max_abs_logit:
        failures.append(
            f"a logit differs by {found.max_abs_logit:.3g}; rounding explains {tolerance.max_abs_logit:.3g}"
        )
    if found.mean_kl is not None and found.mean_kl > tolerance.mean_kl:
        failures.append(
            f"the mean KL divergence is {found.mean_kl:.3g} nats; rounding explains {tolerance.mean_kl:.3g}"
        )
    if found.top1_agreement is not None:
        settled = found.top1_agreement + found.swapped_ties / (found.positions - found.non_finite)
        if settled < tolerance.top1_agreement - 1e-9:
            failures.append(f"the likeliest output agrees at {settled:.2%}, below {tolerance.top1_agreement:.0%}")
    if found.gain is not None and abs(found.gain - 1) > tolerance.gain:
        share, slack = round(found.gain, 2) + 0.0, tolerance.gain
        failures.append(
            f"{share:.0%} of the adapter's effect is in the merged model; rounding explains 100 +- {slack:.0%}"
        )
    return failures


def nudged(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A weight, each number moved by a random part of its spacing in `dtype`, up to half of it either way."""
    shift = torch.rand(weight.shape, generator=generator).to(weight.device) - 0.5
    return weight + shift * spacing(weight, dtype)


def nudge(model: Any, names: set[str], dtype: torch.dtype) -> None:
    """Move these parameters of a float32 model as one rounding would."""
    generator = torch.Generator().manual_seed(SEED)
    codes = dequantize(model)
    for name, parameter in model.named_parameters():
        if name in names and name.removesuffix(".weight") not in codes:
            parameter.data = nudged(parameter.data, dtype, generator)
    for path, weight in codes.items():
        if f"{path}.weight" in names:
            model.set_submodule(path, _nudged_layer(model.get_submodule(path), weight, generator))


def _nudged_layer(layer: Any, weight: Tensor, generator: torch.Generator) -> nn.Linear:
    """A quantized layer as a plain one, its weights moved by up to half a mean gap of their block's levels."""
    blocks = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    shift = 2 * torch.rand(blocks.shape, generator=generator) - 1
    moved = blocks + NF4_ROUNDOFF * blocks.abs().amax(1, keepdim=True) * shift
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    plain.weight.data = moved.reshape(-1)[: weight.numel()].reshape(weight.shape)
    if layer.bias is not None:
        plain.bias.data = layer.bias.data
    return plain
