"""Ask two models the same, and say how far apart their answers are.

Shapes: N scored positions, V outputs (the vocabulary, or a head's classes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.backbones.spec import Head
from peftkit.data.batching import Batch, collate
from peftkit.data.features import Features
from peftkit.record import Part

FORWARD_TOKENS = 4096
POSITIONS = 2000
"""At most so many positions are scored."""


class Difference(Part):
    """How far another model's answers are from the adapter's, over the positions where both are finite.

    `mean_kl` is in nats, from the adapter's distribution; it and `top1_agreement` are absent for regression. For
    multi-label heads they are the KL of the Bernoulli outputs and the share of positions where all decisions agree.
    `swapped_ties` counts the disagreements at which the adapter holds both outputs closer together than rounding can
    tell. `gain` is the share of the adapter's effect on the bare base that the other model has.
    """

    positions: int
    non_finite: int
    max_abs_logit: float | None = None
    rms_logit: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    swapped_ties: int = 0
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class Probes:
    """What both sides are asked.

    Attributes:
        origin: where the prompts come from, in words.
        positions: at most so many positions are scored.
        metrics: the task's metrics of a model on test examples, name -> (value, n); None without test examples.
    """

    features: Sequence[Features]
    head: Head
    origin: str
    positions: int = POSITIONS
    metrics: Callable[[nn.Module], dict[str, tuple[float, int]]] | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """The adapter's answers, held while another model is compared with them.

    Attributes:
        logits: [N, V] float32 in parts, one a forward.
        effect: what the adapter adds to the bare base's logits, [N, V] bfloat16 in the same parts.
        base: how far the bare base is from them.
    """

    probes: Probes
    logits: tuple[Tensor, ...]
    effect: tuple[Tensor, ...]
    base: Difference
    metrics: dict[str, tuple[float, int]]


def take_reference(adapted: Any, probes: Probes) -> Reference:
    """The answers of `adapted`, a `PeftModel` in float32 arithmetic, and of its base with the adapter switched off."""
    logits = tuple(answer(adapted, probes))
    with adapted.disable_adapter():
        bare = answer(adapted, probes)
    effect = tuple((ours - theirs).bfloat16() for ours, theirs in zip(logits, bare, strict=True))
    base = _compare(logits, bare, effect, probes.head.problem, tie=0.0)
    return Reference(probes, logits, effect, base, probes.metrics(adapted) if probes.metrics else {})


@torch.inference_mode()
def answer(model: Any, probes: Probes) -> list[Tensor]:
    """Logits [N, V] in float32, in parts. Examples of one length share a forward, so that no padding enters."""
    left = probes.positions
    parts = []
    for batch in _batches(probes.features, model.device):
        if left <= 0:
            break
        parts.append(_logits(model, batch, probes.head)[:left].float().cpu())
        left -= len(parts[-1])
    return parts


def difference(reference: Reference, model: Any, *, tie: float = 0.0) -> Difference:
    """Compare another model's answers with the reference's; outputs whose logits differ by up to `tie` are tied."""
    theirs = answer(model, reference.probes)
    return _compare(reference.logits, theirs, reference.effect, reference.probes.head.problem, tie=tie)


def _compare(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], effect: Sequence[Tensor], problem: str | None, *, tie: float
) -> Difference:
    worst = square = kl = aligned = power = 0.0
    count = finite = entries = agreed = swapped = 0
    for ours_NV, theirs_NV, effect_NV in zip(ours, theirs, effect, strict=True):
        fine_N = ours_NV.isfinite().all(-1) & theirs_NV.isfinite().all(-1) & effect_NV.isfinite().all(-1)
        count += len(fine_N)
        finite += int(fine_N.sum())
        if not bool(fine_N.any()):
            continue
        a_NV, b_NV, effect_NV = ours_NV[fine_N].double(), theirs_NV[fine_N].double(), effect_NV[fine_N].double()
        gap_NV = b_NV - a_NV
        worst = max(worst, float(gap_NV.abs().max()))
        square += float(gap_NV.square().sum())
        entries += gap_NV.numel()
        aligned += float((gap_NV * effect_NV).sum())
        power += float(effect_NV.square().sum())
        kl += float(_divergence(a_NV, b_NV, problem).sum())
        margin_N = _margin(a_NV, b_NV, problem)
        agreed += int((margin_N == 0).sum())
        swapped += int(((margin_N > 0) & (margin_N <= tie)).sum())
    if not finite:
        return Difference(positions=count, non_finite=count)
    decisive = problem != "regression"
    return Difference(
        positions=count,
        non_finite=count - finite,
        max_abs_logit=worst,
        rms_logit=math.sqrt(square / entries),
        mean_kl=max(0.0, kl / finite) if decisive else None,
        top1_agreement=agreed / finite if decisive else None,
        swapped_ties=swapped if decisive else 0,
        gain=1 + aligned / power if power else None,
    )


def _batches(features: Sequence[Features], device: torch.device) -> list[Batch]:
    groups: dict[int, list[Features]] = {}
    for feature in features:
        groups.setdefault(len(feature), []).append(feature)
    batches = []
    for length, group in groups.items():
        size = max(1, FORWARD_TOKENS // length)
        batches += [collate(group[start : start + size], 0).to(device) for start in range(0, len(group), size)]
    return batches


def _logits(model: Any, batch: Batch, head: Head) -> Tensor:
    """[N, V] where the batch carries loss, or [B, V] of a classification head."""
    if head.kind == "language":
        from peftkit.tasks.language import labelled_logits

        return labelled_logits(model, batch)[0]
    logits: Tensor = model(**batch.inputs()).logits
    return logits


def _divergence(ours_NV: Tensor, theirs_NV: Tensor, problem: str | None) -> Tensor:
    """The KL divergence at each of N positions."""
    if problem != "multi_label_classification":
        return _kl(ours_NV.log_softmax(-1), theirs_NV.log_softmax(-1))
    ours, theirs = torch.stack([ours_NV, -ours_NV], -1), torch.stack([theirs_NV, -theirs_NV], -1)
    return _kl(nn.functional.logsigmoid(ours), nn.functional.logsigmoid(theirs)).sum(-1)


def _margin(ours_NV: Tensor, theirs_NV: Tensor, problem: str | None) -> Tensor:
    """How far, in our logits, the other model's decision lies below ours at each of N positions; 0 where they agree."""
    if problem == "multi_label_classification":
        return (ours_NV.abs() * ((ours_NV > 0) != (theirs_NV > 0))).amax(-1)
    chosen_N1 = theirs_NV.argmax(-1, keepdim=True)
    return ours_NV.amax(-1) - ours_NV.gather(-1, chosen_N1)[:, 0]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)
