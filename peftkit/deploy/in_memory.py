"""The proof where memory holds a model: the reference is asked, then let go, then the candidate is read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftkit.deploy.adapter import Onto, attach, fold
from peftkit.deploy.answers import Difference, Probes, Reference, answer, compare_answers, difference, take_reference
from peftkit.deploy.changes import compare_fingerprints, fingerprints, touched_names
from peftkit.deploy.continuations import Written, compare_written, write
from peftkit.deploy.rounding import dequantize, round_parameters, snapshot, to_float32
from peftkit.deploy.sides import Loaded, Side, load_side, open_side, reload, with_weights
from peftkit.deploy.tolerance import CONTROL_POSITIONS, derive_tolerance, nudge
from peftkit.deploy.verification import MetricPair, Proof, Say, reach_verdict, refuse
from peftkit.errors import InputError

if TYPE_CHECKING:
    from peftkit.backbones.dims import Dims
    from peftkit.tasks.base import Prediction


@dataclass(frozen=True, slots=True)
class _Asked:
    """The reference's side of a comparison, once its model is gone.

    Attributes:
        trained: what the quantized model answers, where the candidate is held to other weights.
        before: fingerprints of the bare base; empty without an adapter.
    """

    reference: Reference
    trained: Reference
    recognised: str
    predictions: list[Prediction]
    written: list[Written]
    before: dict[str, str]
    touched: set[str]
    codes: dict[str, torch.Tensor]


def examine_in_memory(
    side: Side, folder: Path, dims: Dims, probes: Probes, faults: list[str], onto: Onto | None, say: Say
) -> Proof:
    """Compare a candidate with its reference, one of them in memory at a time.

    Args:
        faults: what is known to be wrong already.

    Raises:
        InputError: the reference cannot be loaded. A candidate that cannot be is a failure.
    """
    other = open_side(folder)
    dtype = getattr(torch, other.spec.dtype)
    say(f"asking {side.name}")
    asked = _ask_reference(side, probes, dtype, onto)
    say("asking the candidate, read back from disk")
    try:
        if other.source is None:
            model, dtype, missing = reload(folder, probes.head, side.spec)
            codes = dequantize(model) if onto == "requantized" else {}
            marks = fingerprints(model, dtype, codes) if asked.before else {}
            model = to_float32(model)
        else:
            model, missing, marks = load_side(other).model, [], {}
    except (OSError, ValueError, KeyError, RuntimeError, InputError) as fault:
        told = f"transformers cannot load it: {' '.join(str(fault).split())[:300]}"
        return refuse(probes, other.spec.dtype, [*faults, told], asked.recognised)
    theirs = answer(model, probes)
    widths = [part.shape[-1] for part in (theirs[0], asked.reference.logits[0])]
    if widths[0] != widths[1]:
        told = f"it has {widths[0]} outputs, and the reference {widths[1]}"
        return refuse(probes, other.spec.dtype, [*faults, told], asked.recognised)
    changes = None
    if marks:
        changes = compare_fingerprints(asked.before, marks, asked.touched)
    predictions = probes.predict(model) if asked.predictions and probes.predict else []
    written = write(model, probes.prompts) if asked.written else []
    weights: dict[Onto, Difference] = {}
    if onto is not None and side.source is not None:
        say("measuring the fold onto each kind of weights")
        weights = _weigh(side, asked, compare_answers(asked.trained, theirs), dtype, onto)
    noise = _noise(model, probes, theirs, asked.touched, dtype, always=onto == "requantized")
    tolerance = derive_tolerance(dtype, dims, asked.reference, noise, requantized=onto == "requantized")
    verification = reach_verdict(
        probes,
        dtype,
        [*faults, *missing],
        found=compare_answers(asked.reference, theirs, tie=tolerance.rms_difference),
        reference=asked.reference,
        tolerance=tolerance,
        changes=changes,
        written=compare_written(asked.written, written, tie=tolerance.rms_difference) if written else None,
        metrics=_pair(asked.predictions, predictions, probes) if predictions else None,
    )
    return Proof(verification=verification, recognised_by=asked.recognised, weights=weights)


def _ask_reference(side: Side, probes: Probes, dtype: torch.dtype, onto: Onto | None) -> _Asked:
    """Everything that is asked of the reference, after which its memory is free again."""
    before: dict[str, str] = {}

    def note(model: Any, codes: dict[str, torch.Tensor]) -> None:
        if side.source is not None:
            before.update(fingerprints(model, dtype, codes))

    loaded = load_side(side, before=note)
    reference = trained = take_reference(loaded.model, probes)
    predictions = probes.predict(loaded.model) if probes.predict else []
    written = write(loaded.model, probes.prompts) if probes.prompts else []
    touched = _touched(side, loaded, before)
    recognised, codes = loaded.recognised, loaded.codes
    if onto == "original":
        del loaded
        before.clear()
        over = load_side(side, onto_original=True, before=note)
        reference = take_reference(over.model, probes)
        written = write(over.model, probes.prompts) if probes.prompts else []
    return _Asked(reference, trained, recognised, predictions, written, before, touched, codes)


def _touched(side: Side, loaded: Loaded, before: Mapping[str, str]) -> set[str]:
    return touched_names(side.source, loaded.model, before) if side.source is not None else set()


def _noise(
    model: Any, probes: Probes, theirs: list[torch.Tensor], touched: set[str], dtype: torch.dtype, *, always: bool
) -> Difference | None:
    """What one more rounding of the changed weights does to the model, which it leaves moved; None for float32."""
    if (dtype == torch.float32 and not always) or not touched:
        return None
    few = probes.first(CONTROL_POSITIONS)
    nudge(model, touched, dtype)
    return compare_answers(Reference(few, tuple(theirs)), answer(model, few))


def _weigh(side: Side, asked: _Asked, chosen: Difference, dtype: torch.dtype, onto: Onto) -> dict[Onto, Difference]:
    """The chosen fold and the others, all against the quantized model that was trained."""
    assert side.source is not None
    found: dict[Onto, Difference] = {}
    others: tuple[Onto, ...] = ("dequantized", "original")
    for other in others:
        if other == onto:
            found[other] = chosen
            continue
        plain = with_weights(side.spec, side.head, asked.codes if other == "dequantized" else {})
        grid = snapshot(plain.model, dtype)
        alternative = fold(side.source, to_float32(attach(side.source, plain)))
        round_parameters(alternative, dtype, grid)
        found[other] = difference(asked.trained, to_float32(alternative))
    return found if onto in found else {onto: chosen, **found}


def _pair(ours: list[Prediction], theirs: list[Prediction], probes: Probes) -> dict[str, MetricPair]:
    """The task's metrics of both sides, and what lies between them with its interval over the same examples."""
    from peftkit.report.scores import scores_of, values_over_runs
    from peftkit.stats.means import difference_over_seeds

    runs = [
        scores_of(sorted(rows, key=lambda row: int(row["row"])), num_labels=probes.head.num_outputs)
        for rows in (theirs, ours)
    ]
    names = list(runs[0].scores)
    mine, reference = (values_over_runs([run], names) for run in runs)
    low_K, high_K = difference_over_seeds(mine, reference, paired=True).interval()
    return {
        name: MetricPair(
            adapter=runs[1].scores[name].value(),
            merged=runs[0].scores[name].value(),
            n=len(ours),
            low=float(low),
            high=float(high),
        )
        for name, low, high in zip(names, low_K, high_K, strict=True)
    }
