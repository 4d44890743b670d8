"""The proof of a merge: the model on disk answers like the adapter did, or it is rejected.

Shapes: N scored positions, V outputs (the vocabulary, or a head's classes).

**Like with like.** Both sides are computed in float32 arithmetic, each over its own weights: the adapter over the
frozen base in the numbers it was trained on (bfloat16 values, or NF4 codes through bitsandbytes' own kernels) with its
float32 parameters, the merged model over the numbers in its files. What is left is the fold and its one rounding.
Activations in bfloat16 would bury that: for SmolLM2-135M one and the same adapter computed in bfloat16 and in float32
differs five times more than the merge does.

**Tolerance.** A weight rounded once to a dtype of unit roundoff u (half its machine epsilon) is wrong by a share of at
most u, and so is what its matrix gives. Each of L layers chains four matrices (value and output, up and down) whose
errors are independent, so that the last hidden state, and with it the logits, is off by about u sqrt(4 L) of its size.
Float32 arithmetic, on either side, adds u32 sqrt(K) a matrix for dot products of at most K terms in another order:

    r = sqrt(4 L) (u + u32 sqrt(2 K)) x rms logit       R = 4 r
    largest difference  <= R sqrt(2 ln(N V))     the expected largest of N V normal values of deviation R
    mean KL             <= R^2 / 2               KL = Var(difference) / 2 to second order
    top-1 agreement     >= 100 % for float32, 99 % for narrower dtypes, where swaps of two outputs that the adapter
                           itself holds closer together than r count as agreement (they are reported)
    gain within 1 +- max(1/4, 3 r / (rms effect x sqrt(N)))

The 4 stands for what this leaves out: growth through attention and normalisation, and a base and a delta that nearly
cancel (OLoRA). Correct merges of twelve methods differ by 0.1 to 1.1 r. The gain is how much of the adapter's effect on
the bare base the merged model has: 1 + <difference, effect> / <effect, effect>. The errors of an
unbiased rounding are blind to the effect's direction, so that a delta that was lost (0), doubled (2) or misscaled shows
even where it is smaller than R.
An int8 base is compared through its dequantized weights: its kernel rounds activations too, which no fold can copy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from peftkit.backbones.dims import Dims
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import BackboneSpec, Head
from peftkit.deploy.answers import Difference, Reference, difference
from peftkit.record import Part

MIN_TOP1_ROUNDED = 0.99
GROWTH = 4


class Tolerance(Part):
    """What rounding can explain; see the module's docstring for the derivation."""

    unit_roundoff: float
    chained_matrices: int
    longest_dot_product: int
    compared_logits: int
    rms_logit: float
    rms_difference: float
    gain: float
    max_abs_logit: float
    mean_kl: float
    top1_agreement: float


class MetricPair(Part):
    """One metric of the task on the same test examples."""

    adapter: float
    merged: float
    n: int


class Verification(Part):
    """The verdict and everything it was reached by. `base` is the bare base's distance from the adapter."""

    passed: bool
    failures: tuple[str, ...]
    prompts: str
    dtype: str
    arithmetic: str = "float32"
    difference: Difference
    base: Difference
    tolerance: Tolerance
    compared_tensors: int
    changed_tensors: int
    metrics: dict[str, MetricPair] = Field(default_factory=dict)


def verify(
    reference: Reference,
    folder: Path,
    *,
    spec: BackboneSpec,
    dims: Dims,
    before: Mapping[str, str],
    touched: frozenset[str],
) -> tuple[Verification, nn.Module]:
    """Read the merged model back from `folder` with plain transformers and compare it with the adapter.

    Args:
        spec, dims: the base that the adapter was trained on.
        before: `fingerprints` of the base, in the merged model's dtype.
        touched: paths of the modules that the adapter changes.

    Returns:
        The verdict, and the model that was read back, in float32.
    """
    model, dtype, faults = reload(folder, reference.probes.head, spec)
    changed, strange, lost = _changes(before, fingerprints(model, dtype), touched)
    model.float()
    tolerance = derive_tolerance(dtype, dims, reference)
    found = difference(reference, model, tie=tolerance.rms_difference)
    failures = [*faults, *_judge(found, tolerance)]
    if not changed:
        failures.append("no tensor differs from the base: the adapter was not folded")
    if strange:
        failures.append(f"{len(strange)} tensors changed that the adapter does not touch, such as {strange[0]}")
    if lost:
        failures.append(f"{len(lost)} tensors of the base are gone, such as {lost[0]}")
    merged = reference.probes.metrics(model) if reference.probes.metrics and found.non_finite == 0 else {}
    verdict = Verification(
        passed=not failures,
        failures=tuple(failures),
        prompts=reference.probes.origin,
        dtype=_name(dtype),
        difference=found,
        base=reference.base,
        tolerance=tolerance,
        compared_tensors=len(before),
        changed_tensors=len(changed),
        metrics={
            name: MetricPair(adapter=value, merged=merged[name][0], n=n)
            for name, (value, n) in reference.metrics.items()
            if name in merged
        },
    )
    return verdict, model


def derive_tolerance(dtype: torch.dtype, dims: Dims, reference: Reference) -> Tolerance:
    """The bounds of the module's docstring for this dtype, depth and logit scale."""
    unit = torch.finfo(dtype).eps / 2
    depth = 4 * dims.layers
    longest = max(linear.in_features for linear in dims.linears)
    finite = [part[part.isfinite()].double() for part in reference.logits]
    entries = sum(part.numel() for part in finite)
    rms = math.sqrt(sum(float(part.square().sum()) for part in finite) / max(entries, 1))
    spread = rms * math.sqrt(depth) * (unit + torch.finfo(torch.float32).eps / 2 * math.sqrt(2 * longest))
    effect, positions = reference.base.rms_logit or 0.0, reference.base.positions
    return Tolerance(
        unit_roundoff=unit,
        chained_matrices=depth,
        longest_dot_product=longest,
        compared_logits=entries,
        rms_logit=rms,
        rms_difference=spread,
        gain=max(0.25, 3 * spread / (effect * math.sqrt(positions))) if effect else 0.25,
        max_abs_logit=GROWTH * spread * math.sqrt(2 * math.log(max(entries, 2))),
        mean_kl=(GROWTH * spread) ** 2 / 2,
        top1_agreement=1.0 if dtype == torch.float32 else MIN_TOP1_ROUNDED,
    )


def reload(folder: Path, head: Head, spec: BackboneSpec) -> tuple[Any, torch.dtype, list[str]]:
    """The model in `folder` as plain transformers loads it, the dtype of its weights, and what was missing."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if head.kind == "language" else AutoModelForSequenceClassification
    attention = {} if spec.attention == "auto" else {"attn_implementation": spec.attention}
    with quietly():
        model, report = auto.from_pretrained(
            str(folder),
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=spec.remote_code,
            output_loading_info=True,
            **attention,
        )
    faults = [
        f"{len(report[kind])} tensors are {word} in the files, such as {sorted(map(str, report[kind]))[0]}"
        for kind, word in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unknown"),
            ("mismatched_keys", "misshapen"),
        )
        if report[kind]
    ]
    return model.eval(), model.dtype, faults


def fingerprints(model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """A digest of every parameter's value in `dtype`, by name; tied parameters under each of their names."""
    return {
        name: hashlib.blake2b(
            parameter.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16
        ).hexdigest()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _judge(found: Difference, tolerance: Tolerance) -> list[str]:
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


def _changes(
    before: Mapping[str, str], after: Mapping[str, str], touched: frozenset[str]
) -> tuple[list[str], list[str], list[str]]:
    """Names of tensors that changed, of those of them that the adapter does not touch, and of those that are gone."""
    changed = [name for name, digest in before.items() if after.get(name, digest) != digest]
    strange = [name for name in changed if not any(name.startswith(path + ".") for path in touched)]
    return changed, strange, [name for name in before if name not in after]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
