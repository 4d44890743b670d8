"""The record of a proof: what was asked, what was found, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pydantic import Field

from peftkit.deploy.adapter import Onto
from peftkit.deploy.answers import Difference, Probes, Reference
from peftkit.deploy.changes import Changes
from peftkit.deploy.continuations import Continuations
from peftkit.deploy.tolerance import Tolerance, judge
from peftkit.record import Part

Say = Callable[[str], None]
REPORT_NAME = "merge_report.json"


class Question(Part):
    """What is to be proven.

    Attributes:
        reference: a run, an adapter, or a model.
        candidate: a model's folder, or another run or adapter.
        base: the reference adapter's, where it doesn't know it or it has moved.
        onto: which weights of a quantized base the candidate was folded onto; None where that is not known.
        on: a recipe whose data and task to ask by; None takes the reference's own.
        streamed: read weights layer by layer; None decides by the memory that is free.
        digests: SHA-256 of the candidate's files, from when they were written.
    """

    reference: str
    candidate: str
    base: str | None = None
    onto: Onto | None = None
    on: str | None = None
    max_examples: int = 200
    streamed: bool | None = None
    digests: dict[str, str] = Field(default_factory=dict)


class MetricPair(Part):
    """One metric of the task on the same test examples; `low` and `high` bound merged less adapter, in pairs."""

    adapter: float
    merged: float
    n: int
    low: float | None = None
    high: float | None = None


class Verification(Part):
    """The verdict and everything it was reached by. `base` is the bare base's distance from the adapter."""

    passed: bool
    failures: tuple[str, ...]
    prompts: str
    dtype: str
    arithmetic: str = "float32"
    streamed: bool = False
    difference: Difference | None = None
    base: Difference | None = None
    tolerance: Tolerance | None = None
    continuations: Continuations | None = None
    compared_tensors: int = 0
    changed_tensors: int = 0
    metrics: dict[str, MetricPair] = Field(default_factory=dict)


class Proof(Part):
    """The answer to a question. `weights`: for a quantized base, the fold onto each kind of weights, measured against
    the quantized model that was trained."""

    verification: Verification
    recognised_by: str
    weights: dict[Onto, Difference] = Field(default_factory=dict)


def reach_verdict(
    probes: Probes,
    dtype: torch.dtype,
    faults: list[str],
    *,
    found: Difference,
    reference: Reference,
    tolerance: Tolerance,
    changes: Changes | None,
    written: Continuations | None = None,
    metrics: Mapping[str, MetricPair] | None = None,
    streamed: bool = False,
) -> Verification:
    """Everything put together."""
    failures = [*faults, *judge(found, tolerance), *(changes.faults if changes else ())]
    if written is not None and written.identical + written.tied < written.prompts * tolerance.top1_agreement - 1e-9:
        apart = written.prompts - written.identical - written.tied
        if tolerance.top1_agreement == 1.0 or apart > written.prompts / 2:
            failures.append(f"{apart} of {written.prompts} greedy continuations are not the same")
    return Verification(
        passed=not failures,
        failures=tuple(failures),
        prompts=probes.origin,
        dtype=str(dtype).removeprefix("torch."),
        streamed=streamed,
        difference=found,
        base=reference.base,
        tolerance=tolerance,
        continuations=written,
        compared_tensors=changes.compared if changes else 0,
        changed_tensors=changes.changed if changes else 0,
        metrics=dict(metrics or {}),
    )


def refuse(probes: Probes, dtype: str, failures: list[str], recognised: str) -> Proof:
    """The proof of a candidate that could not be asked anything."""
    verification = Verification(passed=False, failures=tuple(failures), prompts=probes.origin, dtype=dtype)
    return Proof(verification=verification, recognised_by=recognised)
