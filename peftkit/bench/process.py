"""One cell of a suite: whether it has to run, the process that runs it, and the record of how that ended."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peftkit.bench.cell import (
    BUSY,
    LOG_NAME,
    SECONDS_TO_STOP,
    UNAVAILABLE,
    current_record,
    finished,
    holding,
    make_ready,
    outdated,
)
from peftkit.bench.suite import Cell
from peftkit.digests import digests_of
from peftkit.files import explained, write_text
from peftkit.folder import RECIPE_NAME
from peftkit.record import RunRecord, Status, bare_record
from peftkit.units import format_seconds

Say = Callable[[str], None]
GLANCE = 0.25
"""Seconds between looks at whether waiting was called off."""
PATIENCE = 5.0
"""Seconds between interrupts of a process that is to stop."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """How cells are run; none of it changes what a finished cell found.

    Attributes:
        timeout: seconds after which a cell's processes are ended; None lets them run.
        inference: measure afterwards how fast the result answers.
        keep_old: keep finished cells of other code; those of other data are run again all the same.
        even_if_busy: start where the device's memory is in use, too.
    """

    timeout: float | None = None
    inference: bool = True
    keep_old: bool = False
    even_if_busy: bool = False


@dataclass(frozen=True, slots=True)
class CellResult:
    """How one cell stands after a call: its record, and whether this call ran it."""

    cell: Cell
    folder: Path
    record: RunRecord
    ran: bool

    @property
    def status(self) -> Status:
        """How it ended: `ok`, or what went wrong."""
        return self.record.status


class Process(Protocol):
    """A cell's process."""

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None while it runs on after so many seconds."""

    def interrupt(self) -> None:
        """Ask it and what it started to end."""

    def kill(self) -> None:
        """End it and all that it started."""


Launch = Callable[[list[str], Path, Mapping[str, str]], Process]
"""Starts a cell's process of these arguments, with this log, and these variables above the harness's own."""


class FreshProcess:
    """A cell in a new interpreter, leader of its own group: Ctrl-C reaches the harness alone, which passes it on."""

    def __init__(self, arguments: list[str], log: Path, variables: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "peftkit.bench.cell", *arguments, "--with-parent"]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", **variables}
        with explained(log), log.open("ab") as output:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
            )

    def wait(self, seconds: float) -> int | None:
        try:
            code = self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        assert self._child.stdin is not None
        self._child.stdin.close()
        return code

    def interrupt(self) -> None:
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._child.poll() is None:
            os.killpg(self._child.pid, number)


@dataclass(frozen=True, slots=True)
class Settler:
    """Runs cells one at a time, where they have to be run.

    Attributes:
        say: told what is happening.
        cancelled: once set, running cells are ended, and nothing is recorded of them.
    """

    conditions: Conditions
    launch: Launch
    say: Say
    cancelled: threading.Event

    def settle(self, cell: Cell, folder: Path, *, variables: Mapping[str, str], wait: bool) -> CellResult | None:
        """The cell's result, run if it must be. None when the harness was called off, and, unless `wait`, when another
        harness is at it or the device's memory is in use."""
        while not self.cancelled.is_set():
            done = finished(folder, cell.recipe, keep_old=self.conditions.keep_old)
            if done is not None:
                return CellResult(cell, folder, done, ran=False)
            if self._prepare(cell, folder, wait=wait):
                self.say(f"{_named(cell)}: running, its output is in {folder / LOG_NAME}")
                code = self._run(folder, variables)
                if self.cancelled.is_set() or (code == UNAVAILABLE and not wait):
                    return None
                record = self._outcome(cell, folder, code)
                if record is not None:
                    return CellResult(cell, folder, record, ran=True)
            elif finished(folder, cell.recipe, keep_old=self.conditions.keep_old) is not None:
                continue
            if not wait:
                self.say(f"{_named(cell)}: another process runs it")
                return None
        return None

    def _prepare(self, cell: Cell, folder: Path, *, wait: bool) -> bool:
        """Lay the cell's folder for a run. False when another process holds it, or has just finished it."""
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with holding(folder, wait=wait, cancelled=self.cancelled) as held:
            if not held or finished(folder, cell.recipe, keep_old=self.conditions.keep_old) is not None:
                return False
            before = current_record(folder, cell.recipe.digest)
            if before is not None and before.status == "ok":
                changed = " and ".join(outdated(before, digests_of(cell.recipe)))
                self.say(f"{_named(cell)}: finished before, but with other {changed}, so it runs again")
            make_ready(folder, cell.recipe)
            write_text(folder / RECIPE_NAME, cell.recipe.to_yaml())
            return True

    def _run(self, folder: Path, variables: Mapping[str, str]) -> int | None:
        """The exit code of the cell's process, negative for a signal; None when its time was up."""
        conditions = self.conditions
        flags = ["--inference"] * conditions.inference + ["--even-if-busy"] * conditions.even_if_busy
        process = self.launch([str(folder.absolute()), *flags], folder / LOG_NAME, variables)
        started = time.monotonic()
        while (code := process.wait(GLANCE)) is None:
            if self.cancelled.is_set():
                _stop(process)
            elif conditions.timeout is not None and time.monotonic() - started > conditions.timeout:
                process.kill()
                process.wait(SECONDS_TO_STOP)
                return None
        return code

    def _outcome(self, cell: Cell, folder: Path, code: int | None) -> RunRecord | None:
        """The record of a process that has ended, written here when it could not write one. None: another runs it."""
        if code == BUSY:
            return None
        record = current_record(folder, cell.recipe.digest)
        if record is not None:
            return record
        with holding(folder, wait=False) as held:
            if not held:
                return None
            status, reason = self._unexplained_end(folder, code)
            environment = {"python": platform.python_version(), "platform": platform.platform()}
            record = bare_record(cell.recipe, status, reason, environment=environment)
            record.write(folder)
            return record

    def _unexplained_end(self, folder: Path, code: int | None) -> tuple[Status, str]:
        if code is None:
            limit = format_seconds(self.conditions.timeout or 0)
            return "timeout", f"it was ended after the suite's timeout of {limit}; the next call goes on from there"
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; if nobody sent it, the machine ran out of memory" if name == "SIGKILL" else ""
            return "killed", f"the process was killed by {name}{hint}"
        lines = (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = " ".join(line.strip() for line in lines[-3:]) or "it wrote nothing"
        return "failed", f"the process ended with code {code} and no record: {told}"


def _stop(process: Process) -> None:
    """Interrupt it, again where it was too young to hear it, and kill it in the end."""
    for _ in range(int(SECONDS_TO_STOP / PATIENCE)):
        process.interrupt()
        if process.wait(PATIENCE) is not None:
            return
    process.kill()


def _named(cell: Cell) -> str:
    return f"{cell.variant} seed {cell.recipe.seed}"
