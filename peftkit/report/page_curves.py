"""Learning curves of a cell, thinned: training loss by step, and what the validation split scored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from peftkit.record import RunRecord
from peftkit.report.rows import BESIDE_SCORES

LOG_NAME = "log.jsonl"
MOST_POINTS = 200


def cell_curves(folder: Path, record: RunRecord) -> dict[str, Any]:
    """`training` and `validation`, each with `step` and one list a series; absent where nothing was logged.

    `epochs_per_step` scales steps to epochs. More than `MOST_POINTS` lines become means of so many groups of lines.
    """
    training = [line for line in _logged(folder) if _finite(line.get("loss"))]
    history = [line for line in record.history if _finite(line.get("step"))]
    curves: dict[str, Any] = {}
    if training:
        curves["training"] = {
            "step": [group[-1]["step"] for group in _groups(training)],
            "loss": [rounded(fmean(line["loss"] for line in group)) for group in _groups(training)],
        }
    if history:
        kept = [group[-1] for group in _groups(history)]
        names = [name for name in kept[0] if name not in BESIDE_SCORES]
        curves["validation"] = {"step": [line["step"] for line in kept]} | {
            name: [rounded(line[name]) if _finite(line.get(name)) else None for line in kept] for name in names
        }
    last = (training or history or [{}])[-1]
    if _finite(last.get("epoch")) and last["step"] > 0:
        curves["epochs_per_step"] = last["epoch"] / last["step"]
    return curves


def rounded(value: float) -> float:
    """Six significant digits: more than any chart or table shows."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that are whole and have a step; of a resumed run's repeated steps the later ones."""
    path = folder / LOG_NAME
    if not path.is_file():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # a torn last line is what a power cut leaves
            continue
        if isinstance(line, Mapping) and _finite(line.get("step")) and "loss" in line:
            by_step[line["step"]] = dict(line)
    return [by_step[step] for step in sorted(by_step)]


def _groups(lines: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """At most `MOST_POINTS` runs of neighbouring lines, of sizes as equal as can be."""
    count = min(len(lines), MOST_POINTS)
    for i in range(count):
        yield lines[i * len(lines) // count : (i + 1) * len(lines) // count]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
