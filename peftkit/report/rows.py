"""Cells as rows, and rows summarised over their seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from peftkit.errors import InputError
from peftkit.record import RECORD_NAME, Metric, RunRecord, Status, read_record
from peftkit.report.scores import KEPT_RUNS, RunScores, read_run_scores, resamples_over_runs, values_over_runs
from peftkit.stats.bootstrap import t_interval

MANIFEST_NAME = "cells.json"
CELLS_FOLDER = "cells"
Basis = Literal["seeds and examples", "seeds", "examples", "nothing"]
"""What an interval is over."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse", "mae"})


@dataclass(frozen=True, slots=True)
class CellRow:
    """One run: its record, or none when it has not ended yet."""

    variant: str
    seed: int
    folder: Path
    record: RunRecord | None

    @property
    def status(self) -> Status | Literal["missing"]:
        """The record's status; `missing` without one."""
        return "missing" if self.record is None else self.record.status

    @property
    def reason(self) -> str:
        """Why it did not end well; empty when it did."""
        return "not run yet" if self.record is None else (self.record.error or "")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score with its 95 % interval, what that interval is over, and what scores without a model.

    Attributes:
        chance: guessing each label equally often, where predictions tell the labels; else what the record says.
        majority: always giving the most common label.
    """

    value: float
    low: float | None
    high: float | None
    basis: Basis
    n: int
    chance: float | None
    majority: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """One variant, its measurements averaged over the seeds that ended well.

    Attributes:
        main: name of the metric that decides, a key of `metrics`; None when nothing was scored.
        memory_bytes: peak of the training steps over what was held before them.
    """

    variant: str
    rows: tuple[CellRow, ...]
    main: str | None
    metrics: Mapping[str, Estimate]
    trainable: int | None
    artifact_bytes: float | None
    peak_bytes: float | None
    memory_bytes: float | None
    tokens_per_second: float | None
    train_seconds: float | None

    @property
    def ended_well(self) -> int:
        """How many seeds have results."""
        return sum(row.status == "ok" for row in self.rows)

    @property
    def failures(self) -> list[CellRow]:
        """The seeds without results."""
        return [row for row in self.rows if row.status != "ok"]

    @property
    def score(self) -> Estimate | None:
        """The estimate of the main metric."""
        return None if self.main is None else self.metrics[self.main]


def find_cells(folder: Path) -> list[Path]:
    """The run folders that `folder` stands for: its suite's cells in their order, itself, or every run below it.

    Raises:
        InputError: `folder` does not exist, or the suite's own list of its cells is malformed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Name one that train or bench wrote.")
    if (folder / MANIFEST_NAME).exists():
        return [folder / CELLS_FOLDER / name for name in _listed(folder)]
    if (folder / RECORD_NAME).exists():
        return [folder]
    return sorted(path.parent for path in folder.rglob(RECORD_NAME))


def read_cells(folders: Sequence[Path]) -> list[CellRow]:
    """The rows of suite folders (the cells of their latest suite, in its order) and of single runs' folders.

    Raises:
        InputError: a folder is neither, or a record cannot be understood.
    """
    return [
        _read_row(cell)
        for folder in folders
        for cell in (find_cells(folder) if (folder / MANIFEST_NAME).exists() else [folder])
    ]


def named_reference(folders: Sequence[Path]) -> str | None:
    """The reference that the suite folders among these name; None where none does, or they differ."""
    found = {_manifest(folder).get("reference") for folder in folders if (folder / MANIFEST_NAME).exists()}
    return found.pop() if len(found) == 1 else None


def as_documents(rows: Sequence[CellRow]) -> list[dict[str, Any]]:
    """The rows as plain data for JSON."""
    return [
        {"variant": row.variant, "seed": row.seed, "status": row.status, "folder": str(row.folder)}
        | ({} if row.record is None else {"record": row.record.model_dump(mode="json", exclude_none=True)})
        for row in rows
    ]


def _read_row(folder: Path) -> CellRow:
    suite = folder.absolute().parent.parent
    listed = _listed(suite).get(folder.name) if (suite / MANIFEST_NAME).exists() else None
    if listed is None:
        record = read_record(folder)
        return CellRow(record.label, record.seed, folder, record)
    found = read_record(folder) if (folder / RECORD_NAME).exists() else None
    current = found if found is not None and found.recipe_digest == listed["recipe_digest"] else None
    return CellRow(listed["variant"], listed["seed"], folder, current)


def _listed(suite: Path) -> dict[str, dict[str, Any]]:
    """A suite folder's own account of its cells, by name."""
    return {cell["name"]: cell for cell in _manifest(suite)["cells"]}


def _manifest(suite: Path) -> dict[str, Any]:
    path = suite / MANIFEST_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all("name" in cell for cell in found["cells"]):
            return found
        fault: Exception | str = "a cell has no name"
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as caught:
        fault = caught
    raise InputError(f"{path} is not a list of a benchmark's cells ({fault}). Run the benchmark again.")


def summarise(rows: Sequence[CellRow]) -> list[Summary]:
    """One summary a variant: best first where all share a main metric, variants without results last."""
    grouped: dict[str, list[CellRow]] = {}
    for row in rows:
        grouped.setdefault(row.variant, []).append(row)
    summaries = [_summary(variant, group) for variant, group in grouped.items()]
    main = common_metric(summaries)
    sign = 1 if main is not None and main.split()[-1] in LOWER_IS_BETTER else -1

    def order(summary: Summary) -> tuple[bool, float]:
        score = summary.score
        return (score is None, sign * score.value if score is not None and main is not None else 0.0)

    return sorted(summaries, key=order)


def common_metric(summaries: Sequence[Summary]) -> str | None:
    """The main metric that all scored variants share; None when they differ or nothing was scored."""
    names = {summary.main for summary in summaries if summary.main is not None}
    return names.pop() if len(names) == 1 else None


def _summary(variant: str, rows: Sequence[CellRow]) -> Summary:
    records = [row.record for row in rows if row.record is not None and row.record.status == "ok"]
    runs = readable_scores(rows)
    scores = [_scores(record) for record in records]
    names = [name for name in (scores[0] if scores else {}) if all(name in each for each in scores)]
    main = _main_metric(records[0], names) if names else None
    ordered = sorted(names, key=lambda name: name != main)
    return Summary(
        variant=variant,
        rows=tuple(rows),
        main=main,
        metrics=_estimates({name: [each[name] for each in scores] for name in ordered}, runs),
        trainable=next((r.parameters.trainable for r in records if r.parameters is not None), None),
        artifact_bytes=_mean(r.parameters.artifact_bytes if r.parameters else None for r in records),
        peak_bytes=_mean(r.memory.peak_bytes if r.memory else None for r in records),
        memory_bytes=_mean(_over_baseline(r) for r in records),
        tokens_per_second=_mean(r.throughput.tokens_per_second if r.throughput else None for r in records),
        train_seconds=_mean(r.throughput.train_seconds if r.throughput else None for r in records),
    )


def _scores(record: RunRecord) -> Mapping[str, Metric]:
    """Test scores; without a test split those of validation, which their names then say."""
    return record.metrics or {f"validation {name}": metric for name, metric in record.validation_metrics.items()}


def _main_metric(record: RunRecord, names: Sequence[str]) -> str:
    """What the recipe asks for, else the first one, which is the task's own."""
    asked = record.recipe.get("evaluation", {}).get("metric")
    return next((name for name in names if name in (asked, f"validation {asked}")), names[0])


def readable_scores(rows: Sequence[CellRow]) -> list[RunScores]:
    """What the predictions of one variant's finished seeds say; nothing unless all have them, of the same test."""
    try:
        found = [
            read_run_scores(row.folder, row.record)
            for row in rows
            if row.record is not None and row.record.status == "ok"
        ]
    except InputError:
        return []
    return found if len({run.test for run in found}) == 1 else []


def _estimates(metrics: Mapping[str, Sequence[Metric]], runs: Sequence[RunScores]) -> dict[str, Estimate]:
    """Over seeds and examples where predictions allow it; else over seeds, by Student's t, or over examples."""
    told = [name for name in metrics if runs and name in runs[0].scores]
    bounds = _bounds(tuple(runs), tuple(told)) if len(runs) > 1 else {}
    estimates = {}
    for name, found in metrics.items():
        baseline = runs[0].baselines.get(name) if name in told else None
        chance, majority = (baseline.chance, baseline.majority) if baseline else (found[0].chance, None)
        low, high, basis = bounds[name] if name in bounds else _alone(found)
        values = [metric.value for metric in found]
        estimates[name] = Estimate(
            values[0] if len(set(values)) == 1 else fmean(values), low, high, basis, found[0].n, chance, majority
        )
    return estimates


@lru_cache(maxsize=KEPT_RUNS)
def _bounds(runs: tuple[RunScores, ...], names: tuple[str, ...]) -> dict[str, tuple[float, float, Basis]]:
    """Each score's interval over seeds and examples; none for a single example."""
    from peftkit.stats.means import mean_over_seeds

    linear = [name for name in names if not runs[0].scores[name].is_resampled]
    found: dict[str, tuple[float, float, Basis]] = {}
    for group in (linear, *([name] for name in names if name not in linear)):
        values_KSN = values_over_runs(runs, group)
        if len(group) == 0 or values_KSN.shape[-1] < 2:
            continue
        resampled_R = resamples_over_runs(runs, group[0])
        low_K, high_K = mean_over_seeds(values_KSN, None if resampled_R is None else resampled_R[:, None]).interval()
        found |= {name: (float(low_K[k]), float(high_K[k]), "seeds and examples") for k, name in enumerate(group)}
    return found


def _alone(metrics: Sequence[Metric]) -> tuple[float | None, float | None, Basis]:
    """Student's interval over seeds; where they do not differ, the interval over examples."""
    values = [metric.value for metric in metrics]
    if len(set(values)) > 1:
        return *t_interval(values), "seeds"
    return metrics[0].low, metrics[0].high, "nothing" if metrics[0].low is None else "examples"


def _over_baseline(record: RunRecord) -> int | None:
    memory = record.memory
    if memory is None or memory.peak_bytes is None or memory.baseline_bytes is None:
        return None
    return max(0, memory.peak_bytes - memory.baseline_bytes)


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return fmean(measured) if measured else None
