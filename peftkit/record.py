"""The record: one JSON document per run, with the same keys whatever the method.

A number that was not measured is absent. Units: bytes, seconds, tokens; losses are mean nats per loss unit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from peftkit import __version__
from peftkit.errors import InputError
from peftkit.files import write_json
from peftkit.recipe import Recipe

Status = Literal["ok", "oom", "diverged", "failed", "killed", "timeout"]
RECORD_NAME = "record.json"
PREDICTIONS_NAME = "predictions.jsonl"


class Part(BaseModel):
    """One part of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Parameters(Part):
    """Sizes. `artifact_bytes` counts the files that the run would deploy."""

    total: int
    trainable: int
    artifact_bytes: int | None = None


class Memory(Part):
    """Peaks of the training steps. `baseline_bytes` is what was held just before the first step, `predicted_terms` what
    the predicted peak of tensors is made of, `predicted_peak_bytes` what the plan expected of `peak_bytes`."""

    kind: Literal["cuda-reserved", "rss"]
    baseline_bytes: int | None = None
    peak_bytes: int | None = None
    tensor_peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    predicted_tensor_peak_bytes: int | None = None
    predicted_terms: dict[str, int] | None = None


class Throughput(Part):
    """Work done by the training steps alone; evaluation, loading and tokenisation are not in it."""

    samples: int
    tokens: int
    loss_tokens: int
    padding_fraction: float
    train_seconds: float
    cpu_seconds: float
    tokens_per_second: float
    step_seconds_p50: float
    step_seconds_p90: float
    model_flops_utilization: float | None = None


class Loss(Part):
    """Mean loss of the first step, of the last, over the run, and on the validation split."""

    first: float | None = None
    last: float | None = None
    mean: float | None = None
    validation: float | None = None


class Metric(Part):
    """A score with its bootstrap interval (95 %), number of examples, and what chance would give."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int
    chance: float | None = None


class Inference(Part):
    """One way of answering: batches of the evaluation's size for `samples_per_second` and `tokens_per_second` where the
    task scores, one request at a time where it writes; latencies are of one request."""

    examples: int
    samples_per_second: float
    tokens_per_second: float
    latency_seconds_p50: float
    latency_seconds_p90: float


class Energy(Part):
    """What the device's counter, or the processor package's, took in during so many seconds of training steps."""

    joules: float
    source: Literal["nvml", "rapl"]
    seconds: float


class Digests(Part):
    """What a run came from besides its recipe: what it read (`data`), and peftkit's sources and libraries (`code`)."""

    data: str
    code: str


class RunRecord(Part):
    """Everything one run measured."""

    peftkit_version: str
    recipe: dict[str, Any]
    recipe_digest: str
    label: str
    seed: int
    status: Status
    error: str | None = None
    environment: dict[str, Any]
    digests: Digests | None = None
    parameters: Parameters | None = None
    memory: Memory | None = None
    throughput: Throughput | None = None
    inference: dict[str, Inference] = {}
    energy: Energy | None = None
    loss: Loss | None = None
    metrics: dict[str, Metric] = {}
    validation_metrics: dict[str, Metric] = {}
    guards: dict[str, Any] = {}
    artifacts: dict[str, str] = {}
    history: list[dict[str, Any]] = []
    wall_seconds: float | None = None
    phases: dict[str, float] = {}
    """Seconds by phase, of the process that ended the run: read, plan, load, train, score, answer."""

    def write(self, folder: Path) -> None:
        """Write `record.json` into `folder`, absent values left out."""
        write_json(folder / RECORD_NAME, self.model_dump(mode="json", exclude_none=True))


def bare_record(recipe: Recipe, status: Status, error: str | None, *, environment: dict[str, Any]) -> RunRecord:
    """A record that says which run it is and how it ended; a run that measured something adds to it."""
    return RunRecord(
        peftkit_version=__version__,
        recipe=recipe.to_dict(),
        recipe_digest=recipe.digest,
        label=recipe.label,
        seed=recipe.seed,
        status=status,
        error=error,
        environment=environment,
    )


def read_record(folder: Path) -> RunRecord:
    """Read the record of a run's folder.

    Raises:
        InputError: no record there, or one that cannot be understood.
    """
    path = folder / RECORD_NAME
    try:
        return RunRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as fault:
        raise InputError(f"{folder} holds no finished run: {path} cannot be read ({fault.strerror}).") from fault
    except (json.JSONDecodeError, ValidationError) as fault:
        raise InputError(f"{path} is not a record of this version of peftkit: {fault}") from fault


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Per-example predictions of a run's test split, in order."""
    with (folder / PREDICTIONS_NAME).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
