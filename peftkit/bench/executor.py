"""Runs the missing cells of a suite, each in a fresh process, and writes the report of all of them.

    OUT/suite.yaml  cells.json  results.{csv,parquet}  differences.csv  report.{md,html}  scatter.png
    OUT/cells/NAME/{recipe.yaml, record.json, cell.log, ...}   OUT/tuning/VARIANT/..., where the suite tunes

Killed at any moment, the folder is taken up again by the same call.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from peftkit.bench.cell import finished
from peftkit.bench.local import Local
from peftkit.bench.memory import held_to_memory
from peftkit.bench.process import CellResult, Conditions, Say
from peftkit.bench.suite import Cell, Suite
from peftkit.bench.tune import Tuned, tune_suite
from peftkit.extras import load_optuna
from peftkit.files import write_json, write_text
from peftkit.recipe import dump_yaml
from peftkit.report.document import write_report
from peftkit.report.rows import CELLS_FOLDER, MANIFEST_NAME, read_cells
from peftkit.units import format_seconds

SUITE_NAME = "suite.yaml"


class Executor(Protocol):
    """Where cells run."""

    def check(self, conditions: Conditions) -> None:
        """Refuse, before anything is written, what cannot be run there."""

    def run(self, cells: Sequence[tuple[Cell, Path]], conditions: Conditions, say: Say) -> Iterator[CellResult]:
        """Each cell's result in its folder, as they end, whatever the order."""


def run_suite(
    suite: Suite,
    out: Path,
    *,
    report_progress: Say,
    executor: Executor | None = None,
    keep_old: bool = False,
    even_if_busy: bool = False,
) -> list[CellResult]:
    """Tune what the suite tunes, run every missing cell and write the report; results in the suite's order.

    See `run_cells` for what is run.

    Raises:
        RecipeError: the suite's faults; nothing was run.
        OutputError: `out` cannot be written.
        InputError: the suite tunes, and optuna is missing; nothing was run.
        DoesNotFit: the suite's budget of memory is too little for some cells; nothing was run.
        DeviceBusy: the device's memory is in use; nothing was run.
    """
    cells = held_to_memory(suite, suite.cells())  # what is wrong is told before anything is written
    if suite.tune is not None:
        load_optuna("tune")
    conditions = Conditions(suite.timeout, suite.inference, keep_old, even_if_busy)
    executor = executor or Local()
    _check(cells, out / CELLS_FOLDER, executor, conditions)
    write_text(out / SUITE_NAME, dump_yaml(suite.model_dump(mode="json")))
    trials = partial(run_cells, executor=executor, conditions=replace(conditions, inference=False), say=report_progress)
    tuned = tune_suite(suite, out, run=trials, say=report_progress)
    if tuned:
        cells = held_to_memory(suite, suite.cells({variant: found.chosen for variant, found in tuned.items()}))
    write_json(out / MANIFEST_NAME, _manifest(suite, cells, tuned))
    results = run_cells(cells, out / CELLS_FOLDER, executor=executor, conditions=conditions, say=report_progress)
    rows = read_cells([out])
    write_report(out, suite.name, rows, description=suite.description, reference=suite.reference)
    return results


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    executor: Executor | None = None,
    conditions: Conditions | None = None,
    say: Say,
) -> list[CellResult]:
    """Run every missing cell in `folder`/NAME, each in a fresh process; results in the order of the cells.

    A cell that ended well with the same recipe, data and code is kept as it is; any other end is tried again, from its
    newest checkpoint. Cells that another harness is running on the same folder are waited for, after all the others.

    Args:
        executor: where they run; default: here, one after another.
        conditions: a timeout and the like; the defaults when None.
        say: told of each cell that starts, and of each that has ended with what is left to do.

    Raises:
        OutputError: `folder` cannot be written.
        DeviceBusy: the device's memory is in use; nothing was run.
    """
    executor, conditions = executor or Local(), conditions or Conditions()
    _check(cells, folder, executor, conditions)
    results: dict[str, CellResult] = {}
    started = time.monotonic()
    for result in executor.run([(cell, folder / cell.name) for cell in cells], conditions, say):
        results[result.cell.name] = result
        say(_progress_line(results, len(cells), result, time.monotonic() - started))
    return [results[cell.name] for cell in cells]


def _check(cells: Sequence[Cell], folder: Path, executor: Executor, conditions: Conditions) -> None:
    if any(finished(folder / cell.name, cell.recipe, keep_old=conditions.keep_old) is None for cell in cells):
        executor.check(conditions)


def _manifest(suite: Suite, cells: list[Cell], tuned: Mapping[str, Tuned]) -> dict[str, object]:
    """The cells that the report is about, in order: the folder may hold others of an earlier suite."""
    rows = [
        {"name": cell.name, "variant": cell.variant, "seed": cell.recipe.seed, "recipe_digest": cell.recipe.digest}
        | ({} if found is None else {"tuned": found.document()})
        for cell in cells
        for found in [tuned.get(cell.variant, tuned.get(""))]
    ]
    named = {
        key: value
        for key, value in (("reference", suite.reference), ("target_score", suite.target_score))
        if value is not None
    }
    return {"suite": suite.name, "description": suite.description, **named, "cells": rows}


def _progress_line(results: dict[str, CellResult], total: int, result: CellResult, elapsed: float) -> str:
    record = result.record
    told = [f"[{len(results)}/{total}] {result.cell.variant} seed {record.seed}: {record.status}"]
    if record.error is not None:
        told.append(record.error.splitlines()[0])
    if record.metrics:
        name, metric = next(iter(record.metrics.items()))
        told.append(f"{name} {metric.value:.4g}")
    ran = sum(r.ran for r in results.values())
    if not result.ran:
        told.append("finished before")
    elif len(results) < total:
        told.append(f"about {format_seconds(elapsed / ran * (total - len(results)))} left")
    return ", ".join(told)
