"""Cells as rows, and rows summarised over their seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from peftkit.errors import InputError
from peftkit.record import RECORD_NAME, Metric, RunRecord, Status, read_record
from peftkit.report.scores import KEPT_RUNS, SHARES, RunScores, read_run_scores, resamples_over_runs, values_over_runs
from peftkit.stats.bootstrap import t_interval

MANIFEST_NAME = "cells.json"
CELLS_FOLDER = "cells"
Basis = Literal["seeds and examples", "seeds", "examples", "nothing"]
"""What an interval is over."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse", "mae"})
BESIDE_SCORES = frozenset({"step", "epoch", "train_seconds"})
"""What a line of a record's history says besides the loss and the metrics."""
SERVED = ("adapter", "merged", "base")
"""The ways in which a run's inference may have been measured."""


@dataclass(frozen=True, slots=True)
class Outside:
    """Where a run that peftkit did not make comes from, and what a record has no place for.

    Attributes:
        measured: parts of a record as plain data, such as `throughput`; they need not be whole.
        caveats: why it is not comparable, in words.
    """

    source: str
    measured: Mapping[str, Any]
    caveats: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CellRow:
    """One run: its record, or none when it has not ended yet.

    Attributes:
        tuned: what a search chose for it, and `target`: the validation score to reach, as the suite says.
        outside: of a run that others made.
    """

    variant: str
    seed: int
    folder: Path
    record: RunRecord | None
    tuned: Mapping[str, Any] | None = None
    target: float | None = None
    outside: Outside | None = None

    @property
    def status(self) -> Status | Literal["missing"]:
        """The record's status; `missing` without one."""
        return "missing" if self.record is None else self.record.status

    @property
    def reason(self) -> str:
        """Why it did not end well; empty when it did."""
        return "not run yet" if self.record is None else (self.record.error or "")

    @property
    def machine(self) -> str:
        """The card, or the processor, that it ran on; empty where the record does not say."""
        environment = {} if self.record is None else self.record.environment
        return str(environment.get("device_name") or environment.get("device") or "")

    @property
    def test_data(self) -> str:
        """What it was scored on; empty where the record does not say."""
        data = {} if self.record is None else self.record.recipe.get("data", {})
        return str(data.get("test") or data.get("validation") or "")

    def content(self) -> dict[str, Any]:
        """The record as plain data, and what was measured besides; empty without a record."""
        if self.record is None:
            return {}
        found = self.record.model_dump(mode="json", exclude_none=True)
        return found | dict(self.outside.measured) if self.outside is not None else found

    def target_seconds(self) -> float | None:
        """Seconds of training steps until a validation score reached the target; None where none did, or has a time."""
        history = [] if self.record is None else self.record.history
        if self.target is None or self.record is None or not history:
            return None
        names = [name for name in history[-1] if name not in BESIDE_SCORES and name != "loss"] or ["loss"]
        name = _asked(self.record, names)
        sign = -1 if name in LOWER_IS_BETTER else 1
        scored = ((line, _number(line, name)) for line in history)
        reached = (line for line, score in scored if score is not None and sign * score >= sign * self.target)
        return _number(next(reached, {}), "train_seconds")


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
        inference: `adapter`, `merged`, `base` -> what was measured of each, such as `tokens_per_second`.
        energy_joules: of the training steps, where the machine tells.
        target_seconds: until the validation score that the suite names was reached.
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
    inference: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    energy_joules: float | None = None
    target_seconds: float | None = None

    @property
    def ended_well(self) -> int:
        """How many seeds have results."""
        return sum(row.status == "ok" for row in self.rows)

    @property
    def test_data(self) -> str:
        """What its runs were scored on, as the first of them says."""
        return next((row.test_data for row in self.rows if row.record is not None), "")

    @property
    def failures(self) -> list[CellRow]:
        """The seeds without results."""
        return [row for row in self.rows if row.status != "ok"]

    @property
    def score(self) -> Estimate | None:
        """The estimate of the main metric."""
        return None if self.main is None else self.metrics[self.main]

    @property
    def served(self) -> Mapping[str, float]:
        """What was measured of the inference that would be deployed: merged where it can be, else the adapter's."""
        return self.inference.get("merged") or self.inference.get("adapter") or self.inference.get("base") or {}


def find_cells(folder: Path) -> list[Path]:
    """The run folders that `folder` stands for: its suite's cells in their order, itself, or every run below it.

    Raises:
        InputError: `folder` does not exist, or the suite's own list of its cells is malformed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Name one that train or bench wrote.")
    if (folder / MANIFEST_NAME).exists():
        return [folder / CELLS_FOLDER / cell["name"] for cell in read_manifest(folder)["cells"]]
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
    found = {read_manifest(folder).get("reference") for folder in folders if (folder / MANIFEST_NAME).exists()}
    return found.pop() if len(found) == 1 else None


def as_documents(rows: Sequence[CellRow]) -> list[dict[str, Any]]:
    """The rows as plain data for JSON."""
    return [
        {"variant": row.variant, "seed": row.seed, "status": row.status, "folder": str(row.folder)}
        | ({} if row.outside is None else {"source": row.outside.source, "caveats": list(row.outside.caveats)})
        | ({} if row.record is None else {"record": row.content()})
        for row in rows
    ]


def _read_row(folder: Path) -> CellRow:
    suite = folder.absolute().parent.parent
    manifest = read_manifest(suite) if (suite / MANIFEST_NAME).exists() else {"cells": []}
    listed = next((cell for cell in manifest["cells"] if cell["name"] == folder.name), None)
    if listed is None:
        record = read_record(folder)
        return CellRow(record.label, record.seed, folder, record)
    found = read_record(folder) if (folder / RECORD_NAME).exists() else None
    current = found if found is not None and found.recipe_digest == listed["recipe_digest"] else None
    return CellRow(
        listed["variant"], listed["seed"], folder, current, listed.get("tuned"), _number(manifest, "target_score")
    )


def read_manifest(suite: Path) -> dict[str, Any]:
    """A suite folder's own account of itself: `suite`, `description`, `cells`, and what else the suite named.

    Raises:
        InputError: it cannot be read.
    """
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
    """One summary a variant, by test data, best first where all share a main metric; those without results last."""
    grouped: dict[str, list[CellRow]] = {}
    for row in rows:
        grouped.setdefault(row.variant, []).append(row)
    summaries = [_summary(variant, group) for variant, group in grouped.items()]
    main = common_metric(summaries)
    sign = 1 if main is not None and main.split()[-1] in LOWER_IS_BETTER else -1

    splits = list(dict.fromkeys(summary.test_data for summary in summaries))

    def order(summary: Summary) -> tuple[bool, int, float]:
        score = summary.score
        place = sign * score.value if score is not None and main is not None else 0.0
        return (score is None, splits.index(summary.test_data), place)

    return sorted(summaries, key=order)


def common_metric(summaries: Sequence[Summary]) -> str | None:
    """The main metric that all scored variants share; None when they differ or nothing was scored."""
    names = {summary.main for summary in summaries if summary.main is not None}
    return names.pop() if len(names) == 1 else None


def _summary(variant: str, rows: Sequence[CellRow]) -> Summary:
    finished = [row for row in rows if row.status == "ok"]
    records = [row.record for row in finished if row.record is not None]
    contents = [row.content() for row in finished]
    runs = readable_scores(rows)
    scores = [_scores(record) for record in records]
    names = [name for name in (scores[0] if scores else {}) if all(name in each for each in scores)]
    main = _asked(records[0], names) if names else None
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
        tokens_per_second=_mean(_number(content, "throughput", "tokens_per_second") for content in contents),
        train_seconds=_mean(_number(content, "throughput", "train_seconds") for content in contents),
        inference=_inference(contents),
        energy_joules=_mean(_number(content, "energy", "joules") for content in contents),
        target_seconds=_mean(row.target_seconds() for row in finished),
    )


def _inference(contents: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Each figure averaged over the seeds that have it."""
    found: dict[str, dict[str, float]] = {}
    for way in SERVED:
        figures = [content.get("inference", {}).get(way, {}) for content in contents]
        names = dict.fromkeys(name for each in figures for name in each)
        means = {name: _mean(_number(each, name) for each in figures) for name in names}
        measured = {name: value for name, value in means.items() if value is not None}
        if measured:
            found[way] = measured
    return found


def _number(content: Mapping[str, Any], *path: str) -> float | None:
    """The number at a path of plain keys; None where there is none."""
    found: Any = content
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def _scores(record: RunRecord) -> Mapping[str, Metric]:
    """Test scores; without a test split those of validation, which their names then say."""
    return record.metrics or {f"validation {name}": metric for name, metric in record.validation_metrics.items()}


def _asked(record: RunRecord, names: Sequence[str]) -> str:
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
        value = values[0] if len(set(values)) == 1 else fmean(values)
        estimates[name] = Estimate(value, *_possible(name, low, high), basis, found[0].n, chance, majority)
    return estimates


def _possible(name: str, low: float | None, high: float | None) -> tuple[float | None, float | None]:
    """The part of an interval that the metric can take: two seeds that differ give more than a share can be."""
    if name.split()[-1] not in SHARES or low is None or high is None:
        return low, high
    return max(0.0, low), min(1.0, high)


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
