"""Cells at once, over their time, and run again: with processes that a test plays or that do nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftkit.bench import cell as cell_module
from peftkit.bench.cell import UNAVAILABLE, make_ready
from peftkit.bench.executor import run_cells
from peftkit.bench.local import Local
from peftkit.bench.process import Conditions, FreshProcess
from peftkit.bench.suite import Cell, build_suite
from peftkit.digests import digests_of
from peftkit.errors import RecipeError
from peftkit.record import Digests, Status, bare_record, read_record

RECIPE = {"backbone": "minilm-l6", "method": "lora", "task": "classify", "data": {"train": "builtin:movie-sentiment"}}


def cells(*seeds: int) -> list[Cell]:
    return build_suite({"name": "tiny", "recipe": RECIPE, "seeds": list(seeds)}).cells()


def silent(text: str) -> None:
    """Progress that nobody reads."""


def end(cell: Cell, folder: Path, status: Status = "ok", digests: Digests | None = None) -> None:
    """Leave what a cell's process would."""
    record = bare_record(cell.recipe, status, None if status == "ok" else "told", environment={})
    record.model_copy(update={"digests": digests or digests_of(cell.recipe)}).write(folder)


class Played:
    """A process that a function plays: called until it gives an exit code."""

    def __init__(self, act: Callable[[], int | None]) -> None:
        self.act = act

    def wait(self, seconds: float) -> int | None:
        return self.act()

    def interrupt(self) -> None:
        raise AssertionError("nobody interrupts it")

    kill = interrupt


def test_two_cells_at_once_share_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    both = threading.Barrier(2, timeout=60)
    given: list[Mapping[str, str]] = []

    def launch(arguments: list[str], log: Path, variables: Mapping[str, str]) -> Played:
        given.append(variables)
        cell = next(cell for cell in cells(0, 1) if cell.name == log.parent.name)

        def act() -> int:
            both.wait()  # a second cell is there before the first one ends
            end(cell, log.parent)
            return 0

        return Played(act)

    results = run_cells(cells(0, 1), tmp_path, executor=Local(jobs=2, launch=launch), say=silent)
    assert [(result.cell.recipe.seed, result.status, result.ran) for result in results] == [
        (0, "ok", True),
        (1, "ok", True),
    ]
    assert given == [{"OMP_NUM_THREADS": "4"}] * 2


def test_a_cell_that_finds_the_memory_in_use_is_tried_again_alone_and_then_a_row(tmp_path: Path) -> None:
    tries: list[str] = []

    def launch(arguments: list[str], log: Path, variables: Mapping[str, str]) -> Played:
        tries.append(log.parent.name)
        cell = next(cell for cell in cells(0, 1) if cell.name == log.parent.name)
        busy = cell.recipe.seed == 0
        end(cell, log.parent, "failed" if busy else "ok")
        return Played(lambda: UNAVAILABLE if busy else 0)

    first, second = run_cells(cells(0, 1), tmp_path, executor=Local(launch=launch), say=silent)
    assert tries == [first.cell.name, second.cell.name, first.cell.name]
    assert (first.status, first.record.error, second.status) == ("failed", "told", "ok")


class Sleeper(FreshProcess):
    """A process that sleeps, with a child that does."""

    started: list[psutil.Process]

    def __init__(self, arguments: list[str], log: Path, variables: Mapping[str, str]) -> None:
        code = (
            "import signal, subprocess, time\n"
            "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"  # the tests may run deaf to it, in the background
            "print(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
            "time.sleep(600)"
        )
        pipe = subprocess.PIPE
        self._child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, process_group=0)
        with self._child.stdout as told:
            Sleeper.started = [psutil.Process(self._child.pid), psutil.Process(int(told.readline()))]


def test_a_cell_over_its_time_is_ended_with_all_that_it_started_and_is_a_row(tmp_path: Path) -> None:
    conditions = Conditions(timeout=0.5)
    (result,) = run_cells(cells(0), tmp_path, executor=Local(launch=Sleeper), conditions=conditions, say=silent)
    assert (result.status, result.ran) == ("timeout", True)
    assert read_record(result.folder).error == (
        "it was ended after the suite's timeout of 0.5s; the next call goes on from there"
    )
    _, alive = psutil.wait_procs(Sleeper.started, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_harness_that_is_interrupted_ends_its_cells_and_records_nothing(tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        if "running" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(cells(0, 1), tmp_path, executor=Local(jobs=2, launch=Sleeper), say=interrupt)
    _, alive = psutil.wait_procs(Sleeper.started, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.parametrize(
    ("changed", "keep_old", "runs", "told"),
    [
        ({}, False, False, ""),
        ({"data": "0"}, False, True, "finished before, but with other data, so it runs again"),
        ({"code": "0"}, False, True, "finished before, but with other code, so it runs again"),
        ({"code": "0"}, True, False, ""),
        ({"data": "0", "code": "0"}, True, True, "finished before, but with other data and code, so it runs again"),
    ],
)
def test_a_finished_cell_runs_again_when_its_data_or_code_changed_and_only_then(
    changed: dict[str, str], keep_old: bool, runs: bool, told: str, tmp_path: Path
) -> None:
    (cell,) = cells(0)
    end(cell, tmp_path / cell.name, digests=digests_of(cell.recipe).model_copy(update=changed))
    said: list[str] = []

    def launch(arguments: list[str], log: Path, variables: Mapping[str, str]) -> Played:
        end(cell, log.parent)
        return Played(lambda: 0)

    conditions = Conditions(keep_old=keep_old)
    (result,) = run_cells([cell], tmp_path, executor=Local(launch=launch), conditions=conditions, say=said.append)
    assert (result.status, result.ran) == ("ok", runs)
    assert told in said[0]


def test_work_of_other_code_is_not_taken_up_and_neither_is_half_a_file(tmp_path: Path) -> None:
    (cell,) = cells(0)
    folder = tmp_path / cell.name
    checkpoint = folder / "checkpoints" / "step-000001"

    def lay() -> None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / ".partial-abc").mkdir(exist_ok=True)
        for name in (".partial-xyz", "record.json", "cell.log"):
            (folder / name).write_text("{")

    lay()
    make_ready(folder, cell.recipe)
    assert not checkpoint.exists(), "nobody knows what this came from"
    lay()
    make_ready(folder, cell.recipe)
    assert sorted(path.name for path in folder.rglob("*")) == [
        *("cell.log", "checkpoints", "digests.json", "step-000001")
    ]
    (folder / "digests.json").write_text('{"data": "0", "code": "0"}')
    make_ready(folder, cell.recipe)
    assert sorted(path.name for path in folder.rglob("*")) == ["cell.log", "digests.json"]


def test_a_suites_timeout_is_read_as_people_write_it() -> None:
    def timeout(value: Any) -> float | None:
        return build_suite({"name": "tiny", "recipe": RECIPE, "timeout": value}).timeout

    assert [timeout(value) for value in (90, "90", "45s", "30m", "1h30m", "1.5h", None)] == [
        *(90, 90, 45, 1800, 5400, 5400, None)
    ]
    for wrong in ("soon", "", "30 m h", -1):
        with pytest.raises(RecipeError, match="timeout"):
            timeout(wrong)


def test_a_cell_on_a_busy_device_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.errors import DeviceBusy

    (cell,) = cells(0)
    folder = tmp_path / cell.name
    folder.mkdir()
    (folder / "recipe.yaml").write_text(cell.recipe.to_yaml())

    def busy() -> None:
        raise DeviceBusy("process 4242 holds it")

    monkeypatch.setattr(cell_module, "require_idle", busy)
    assert cell_module.main([str(folder)]) == UNAVAILABLE
    assert (read_record(folder).status, read_record(folder).error) == ("failed", "process 4242 holds it")
