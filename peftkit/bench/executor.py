"""Runs the missing cells of a suite, each in a fresh process, and writes the report of all of them.

    OUT/suite.yaml  cells.json  results.{csv,parquet}  differences.csv  report.{md,html}  scatter.png
    OUT/cells/NAME/{recipe.yaml, record.json, cell.log, ...}

Killed at any moment, the folder is taken up again by the same call.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peftkit.bench.cell import (
    BUSY,
    clear_failure,
    current_record,
    finished,
    holding,
)
from peftkit.bench.suite import Cell, Suite
from peftkit.files import explained, write_json, write_text
from peftkit.folder import RECIPE_NAME
from peftkit.recipe import dump_yaml
from peftkit.record import RunRecord, Status, bare_record
from peftkit.report.document import write_report
from peftkit.report.rows import CELLS_FOLDER, MANIFEST_NAME, read_cells
from peftkit.units import format_seconds

SUITE_NAME = "suite.yaml"
LOG_NAME = "cell.log"
SECONDS_TO_STOP = 30.0
"""How long an interrupted cell may take to end before it is killed."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """How one cell stands after `run_suite`: its record, and whether this call ran it."""

    cell: Cell
    folder: Path
    record: RunRecord
    ran: bool

    @property
    def status(self) -> Status:
        """How it ended: `ok`, or what went wrong."""
        return self.record.status


def run_suite(suite: Suite, out: Path, *, report_progress: Callable[[str], None]) -> list[CellResult]:
    """Run every missing cell of the suite, one after another, and write the report; results in the suite's order.

    A cell that ended well with the same recipe is kept as it is; any other end is tried again. Cells that another
    harness is running on the same folder are waited for, after all the others.

    Raises:
        RecipeError: the suite's faults; nothing was run.
        OutputError: `out` cannot be written.
    """
    cells = suite.cells()
    write_text(out / SUITE_NAME, dump_yaml(suite.model_dump(mode="json")))
    write_json(out / MANIFEST_NAME, _manifest(suite, cells))
    results: dict[str, CellResult] = {}
    started = time.monotonic()
    for wait in (False, True):
        for cell in cells:
            if cell.name not in results:
                result = _settle(cell, out / CELLS_FOLDER / cell.name, wait=wait, say=report_progress)
                if result is not None:
                    results[cell.name] = result
                    report_progress(_progress_line(results, len(cells), result, time.monotonic() - started))
    rows = read_cells([out])
    write_report(out, suite.name, rows, description=suite.description, reference=suite.reference)
    return [results[cell.name] for cell in cells]


def _manifest(suite: Suite, cells: list[Cell]) -> dict[str, object]:
    """The cells that the report is about, in order: the folder may hold others of an earlier suite."""
    rows = [
        {"name": cell.name, "variant": cell.variant, "seed": cell.recipe.seed, "recipe_digest": cell.recipe.digest}
        for cell in cells
    ]
    named = {} if suite.reference is None else {"reference": suite.reference}
    return {"suite": suite.name, "description": suite.description, **named, "cells": rows}


def _settle(cell: Cell, folder: Path, *, wait: bool, say: Callable[[str], None]) -> CellResult | None:
    """The cell's result, run if it must be. None, unless `wait`, when another harness is at it."""
    while True:
        done = finished(folder, cell.recipe.digest)
        if done is not None:
            return CellResult(cell, folder, done, ran=False)
        if _prepare(cell, folder, wait=wait):
            say(f"{cell.variant} seed {cell.recipe.seed}: running, its output is in {folder / LOG_NAME}")
            record = _outcome(cell, folder, _run_process(folder))
            if record is not None:
                return CellResult(cell, folder, record, ran=True)
        say(f"{cell.variant} seed {cell.recipe.seed}: another process runs it")
        if not wait:
            return None


def _prepare(cell: Cell, folder: Path, *, wait: bool) -> bool:
    """Lay the cell's folder for a run. False when another process holds it, or has just finished it."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with holding(folder, wait=wait) as held:
        if not held or finished(folder, cell.recipe.digest) is not None:
            return False
        clear_failure(folder)
        write_text(folder / RECIPE_NAME, cell.recipe.to_yaml())
        return True


def _run_process(folder: Path) -> int:
    """Run the cell in a fresh process of its own group; its exit code, negative for a signal."""
    command = [sys.executable, "-m", "peftkit.bench.cell", str(folder.absolute()), "--with-parent"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
    with explained(folder), (folder / LOG_NAME).open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0
        )
    # Its own group: Ctrl-C reaches this process alone, which passes it on once.
    with child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                child.kill()
            raise


def _outcome(cell: Cell, folder: Path, code: int) -> RunRecord | None:
    """The record of a process that has ended, written here when it could not write one. None: another one runs it."""
    if code == BUSY:
        return None
    record = current_record(folder, cell.recipe.digest)
    if record is not None:
        return record
    with holding(folder, wait=False) as held:
        if not held:
            return None
        status, reason = _unexplained_end(folder, code)
        environment = {"python": platform.python_version(), "platform": platform.platform()}
        record = bare_record(cell.recipe, status, reason, environment=environment)
        record.write(folder)
        return record


def _unexplained_end(folder: Path, code: int) -> tuple[Status, str]:
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; if nobody sent it, the machine ran out of memory" if name == "SIGKILL" else ""
        return "killed", f"the process was killed by {name}{hint}"
    lines = (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = " ".join(line.strip() for line in lines[-3:]) or "it wrote nothing"
    return "failed", f"the process ended with code {code} and no record: {told}"


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
