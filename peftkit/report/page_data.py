"""Everything that the page shows, as one plain document for its scripts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import __version__
from peftkit.folder import RECIPE_NAME
from peftkit.record import Metric
from peftkit.report.advice import Advice, advise
from peftkit.report.method_comparison import caveats
from peftkit.report.page_curves import cell_curves, rounded
from peftkit.report.page_examples import collect_examples
from peftkit.report.rows import LOWER_IS_BETTER, CellRow, Estimate, Summary, summarise
from peftkit.report.scores import SHARES

if TYPE_CHECKING:
    from peftkit.report.comparison import Difference

SUITE_FILE = "suite.yaml"
SEPARATOR = "\x1f"
"""Between the parts of a flattened key: names of columns may have dots in them."""
Flat = dict[str, Any]


def page_document(
    out: Path,
    suite_name: str,
    rows: Sequence[CellRow],
    differences: Sequence[Difference],
    *,
    description: str = "",
    left_out: Mapping[str, str] | None = None,
    advice: Sequence[Advice] | None = None,
) -> dict[str, Any]:
    """The document of one report. What was not measured is absent or null; the same rows give the same document.

    Runs that others made stand apart, unless there are no others.

    Args:
        left_out: variants that could not be compared, and why.
        advice: what to take; None has it worked out.
    """
    outside = [row for row in rows if row.outside is not None]
    own = [row for row in rows if row.outside is None]
    rows = own or outside
    told = advise(own) if advice is None and own else advice or []
    summaries = summarise(rows)
    places = {summary.variant: place for place, summary in enumerate(summaries)}
    examples = collect_examples(rows)
    recipe, recipes = shared_settings([flattened(row.record.recipe) if row.record else None for row in rows])
    environment, environments = shared_settings(
        [flattened(row.record.environment) if row.record else None for row in rows]
    )
    cells = [
        _cell(row)
        | {"variant": places[row.variant], "recipe": own, "environment": machine, "examples": columns}
        | {"command": _train_command(row)}
        for row, own, machine, columns in zip(rows, recipes, environments, examples.columns, strict=True)
    ]
    suite = out / SUITE_FILE
    return {
        "suite": suite_name,
        "description": description.strip(),
        "advice": [found.to_document() for found in told],
        "outside": _outside(outside, own),
        "version": __version__,
        "command": f"peftkit bench {_quoted(suite)} --out {_quoted(out)}" if suite.is_file() else None,
        "lower_is_better": sorted(LOWER_IS_BETTER),
        "shares": sorted(SHARES),
        "variants": [_variant(summary) for summary in summaries],
        "differences": [_difference(found) for found in differences],
        "left_out": dict(left_out or {}),
        "cells": cells,
        "recipe": recipe,
        "environment": environment,
        "example_sets": examples.sets,
        "example_stride": examples.stride,
    }


def flattened(content: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested mappings as one, keys joined by `SEPARATOR`; lists and empty mappings are values."""
    flat: Flat = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}{SEPARATOR}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shared_settings(found: Sequence[Flat | None]) -> tuple[Flat, list[Flat | None]]:
    """What all that have settings agree on, and what each says besides."""
    known = [settings for settings in found if settings is not None]
    first = known[0] if known else {}
    common = {
        key: value for key, value in first.items() if all(key in each and _same(each[key], value) for each in known)
    }
    own = [None if each is None else {key: value for key, value in each.items() if key not in common} for each in found]
    return common, own


def _same(one: Any, other: Any) -> bool:
    """Equal and of one type: a recipe's 1 and true are different settings."""
    return type(one) is type(other) and bool(one == other)


def _outside(rows: Sequence[CellRow], own: Sequence[CellRow]) -> Flat | None:
    """The runs that others made, and what is not comparable; they are lines of their own beside one's own alone."""
    if not rows or rows[0].outside is None:
        return None
    lines = [
        _variant(summary) | {"status": row.status, "reason": row.reason, "machine": row.machine}
        for summary in summarise(rows)
        for row in summary.rows[:1]
    ]
    return {"source": rows[0].outside.source, "caveats": caveats(rows, own), "variants": lines if own else []}


def _variant(summary: Summary) -> Flat:
    return {
        "name": summary.variant,
        "main": summary.main,
        "test_data": summary.test_data,
        "metrics": {name: _estimate(found) for name, found in summary.metrics.items()},
        "trainable": summary.trainable,
        "artifact_bytes": summary.artifact_bytes,
        "peak_bytes": summary.peak_bytes,
        "memory_bytes": summary.memory_bytes,
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "samples_per_second": summary.served.get("samples_per_second"),
        "latency_seconds": summary.served.get("latency_seconds_p50"),
        "energy_joules": summary.energy_joules,
        "target_seconds": summary.target_seconds,
        "ended_well": summary.ended_well,
        "planned": len(summary.rows),
    }


def _difference(found: Difference) -> Flat:
    return {key: rounded(value) if isinstance(value, float) else value for key, value in asdict(found).items()}


def _estimate(found: Estimate) -> Flat:
    """Unrounded, so that its last shown digit is that of the tables."""
    bounds = {"low": found.low, "high": found.high, "chance": found.chance, "majority": found.majority}
    return {"value": found.value, "basis": found.basis, "n": found.n} | {
        name: value for name, value in bounds.items() if value is not None
    }


def _cell(row: CellRow) -> Flat:
    cell: Flat = {"seed": row.seed, "status": row.status, "reason": row.reason, "folder": str(row.folder)}
    return cell if row.record is None else cell | _measured(row)


def _measured(row: CellRow) -> Flat:
    record = row.record
    assert record is not None
    content = row.content()
    inference = {way: _numbers(found) for way, found in content.get("inference", {}).items()}
    return {
        "label": record.label,
        "digest": record.recipe_digest,
        "metrics": {name: _metric(metric) for name, metric in record.metrics.items()},
        "validation": {name: _metric(metric) for name, metric in record.validation_metrics.items()},
        **{part: _numbers(content.get(part, {})) for part in ("parameters", "memory", "throughput", "loss", "energy")},
        "inference": inference,
        "target_seconds": row.target_seconds(),
        "wall_seconds": record.wall_seconds,
        "curves": cell_curves(row.folder, record),
    }


def _metric(metric: Metric) -> list[float | None]:
    """Value, low, high."""
    return [None if value is None else rounded(value) for value in (metric.value, metric.low, metric.high)]


def _numbers(part: Mapping[str, Any]) -> Flat:
    return {key: rounded(value) if isinstance(value, float) else value for key, value in part.items()}


def _train_command(row: CellRow) -> str:
    if row.outside is not None:
        return f"make results/{shlex.quote(row.folder.name)}  # in a checkout of {row.outside.source}"
    return f"peftkit train {_quoted(row.folder / RECIPE_NAME)} --out {_quoted(Path('runs', 'again', row.folder.name))}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
