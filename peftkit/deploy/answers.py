"""Ask two models the same, and say how far apart their answers are.

Shapes: N scored positions, V outputs (the vocabulary, or a head's classes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.backbones.spec import Head
from peftkit.data.batching import Batch, collate
from peftkit.data.features import Features
from peftkit.record import Part
from peftkit.tasks.base import Prediction

FORWARD_TOKENS = 4096
POSITIONS = 2000
"""At most so many positions are scored."""
LOGIT_BYTES = 2**29
"""And so many that the logits of one side take no more than this."""


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
        prompts: [T] token ids that continuations are written to.
        positions: at most so many positions are scored.
        predict: the task's predictions of a model on test examples; None without such.
    """

    features: Sequence[Features]
    head: Head
    origin: str
    prompts: Sequence[Sequence[int]] = ()
    positions: int = POSITIONS
    predict: Callable[[nn.Module], list[Prediction]] | None = None

    def first(self, positions: int) -> Probes:
        """The same questions, of which no more than so many positions are scored."""
        return replace(self, positions=min(self.positions, positions))


@dataclass(frozen=True, slots=True)
class Reference:
    """The adapter's answers, held while another model is compared with them.

    Attributes:
        logits: [N, V] float32 in parts, one a forward.
        effect: what the adapter adds to the bare base's logits, [N, V] bfloat16 in the same parts; None for a model
            that has no adapter.
        base: how far the bare base is from them.
    """

    probes: Probes
    logits: tuple[Tensor, ...]
    effect: tuple[Tensor, ...] | None = None
    base: Difference | None = None


def take_reference(model: Any, probes: Probes) -> Reference:
    """The answers of a model in float32 arithmetic; of a `PeftModel`, those of its base without the adapter as well."""
    from peft import PeftModel

    logits = tuple(answer(model, probes))
    if not isinstance(model, PeftModel):
        return Reference(probes, logits)
    with model.disable_adapter():
        bare = answer(model, probes)
    effect = tuple((ours - theirs).bfloat16() for ours, theirs in zip(logits, bare, strict=True))
    return Reference(probes, logits, effect, _compare(logits, bare, effect, probes.head.problem, tie=0.0))


@torch.inference_mode()
def answer(model: Any, probes: Probes) -> list[Tensor]:
    """Logits [N, V] in float32, in parts. Examples of one length share a forward, so that no padding enters."""
    left = min(probes.positions, max(1, LOGIT_BYTES // (4 * _outputs(model, probes.head))))
    parts = []
    for batch in _batches(probes.features, model.device):
        if left <= 0:
            break
        parts.append(_logits(model, batch, probes.head)[:left].float().cpu())
        left -= len(parts[-1])
    return parts


def difference(reference: Reference, model: Any, *, tie: float = 0.0) -> Difference:
    """Compare another model's answers with the reference's; outputs whose logits differ by up to `tie` are tied."""
    return compare_answers(reference, answer(model, reference.probes), tie=tie)


def compare_answers(reference: Reference, theirs: Iterable[Tensor], *, tie: float = 0.0) -> Difference:
    """The same of answers that were had otherwise, from another engine: [N, V] in the reference's parts.

    Fewer parts than the reference has compare its first ones.
    """
    parts = list(theirs)
    count = len(parts)
    effect = None if reference.effect is None else reference.effect[:count]
    last = len(parts[-1]) if parts else 0
    ours = [*reference.logits[: count - 1], *(part[:last] for part in reference.logits[count - 1 : count])]
    if effect:
        effect = (*effect[:-1], effect[-1][:last])
    return _compare(ours, parts, effect, reference.probes.head.problem, tie=tie)


def _compare(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    effect: Sequence[Tensor] | None,
    problem: str | None,
    *,
    tie: float,
) -> Difference:
    worst = square = kl = aligned = power = 0.0
    count = finite = entries = agreed = swapped = 0
    known = effect if effect is not None else [part.new_zeros(1, 1) for part in ours]
    for ours_NV, theirs_NV, effect_NV in zip(ours, theirs, known, strict=True):
        effect_NV = effect_NV.expand_as(ours_NV)
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


def _outputs(model: Any, head: Head) -> int:
    """V."""
    return head.num_outputs if head.kind == "classification" else int(model.config.get_text_config().vocab_size)


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
