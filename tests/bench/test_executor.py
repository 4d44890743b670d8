"""Cells in processes of their own: failures, kills, locks, and what is run again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from kill_bench import is_cell

from peftkit.bench import cell as cell_module
from peftkit.bench.cell import BUSY, finished, holding, run_cell
from peftkit.bench.executor import CellResult, run_suite
from peftkit.bench.suite import Cell, Suite, build_suite
from peftkit.digests import digests_of
from peftkit.errors import Diverged, MethodError
from peftkit.files import write_text
from peftkit.record import bare_record, read_record
from peftkit.report.rows import read_cells

RECIPE = {
    "backbone": "minilm-l6",
    "method": {"kind": "lora", "rank": 4},
    "task": "classify",
    "data": {
        "train": "builtin:movie-sentiment",
        "test": "builtin:movie-sentiment",
        "limit": {"train": 16, "test": 8},
    },
    "training": {"max_steps": 1, "batch_size": 16, "max_tokens": 32},
}
PATIENCE = 60.0
"""Seconds after which a process that a test waits for is given up."""


def suite(**content: Any) -> Suite:
    return build_suite({"name": "tiny", "recipe": RECIPE, **content})


def silent(text: str) -> None:
    """Progress that nobody reads."""


def finish(cell: Cell, folder: Path) -> None:
    """Lay a finished run, as `train` would have left it."""
    record = bare_record(cell.recipe, "failed", "", environment={})
    update = {"status": "ok", "error": None, "digests": digests_of(cell.recipe)}
    record.model_copy(update=update).write(folder)


def lay(cell: Cell, folder: Path) -> None:
    write_text(folder / "recipe.yaml", cell.recipe.to_yaml())


def until(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition, looked at until it holds."""
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        found = condition()
        if found:
            return found
        tick.wait(0.02)
    raise AssertionError("waited in vain")


def cell_process(parent: int) -> psutil.Process | None:
    """The cell that this process is running, forked or started anew."""
    return next((child for child in psutil.Process(parent).children(recursive=True) if is_cell(child)), None)


@pytest.fixture
def cell() -> Cell:
    return suite().cells()[0]


# In one process: the cell boundary.


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts a function in the place of `train`."""

    def put(act: Callable[..., Any]) -> None:
        module = ModuleType("peftkit.run")
        module.train = act  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "peftkit.run", module)

    return put


@pytest.mark.parametrize(
    ("fault", "status", "told"),
    [
        (Diverged("the loss is nan at step 3"), "diverged", "the loss is nan at step 3"),
        (MethodError("method 'head' needs a head"), "failed", "method 'head' needs a head"),
        (MemoryError(), "oom", "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom", "can't allocate memory"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero (traceback in error.txt)"),
    ],
)
def test_a_failure_becomes_a_record_with_its_status_and_reason(
    fault: Exception, status: str, told: str, cell: Cell, tmp_path: Path, training: Callable[[Callable[..., Any]], None]
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise fault

    training(fail)
    lay(cell, tmp_path)
    record = run_cell(tmp_path)
    assert (record.status, record.recipe_digest) == (status, cell.recipe.digest)
    assert record.error is not None
    assert told in record.error
    assert read_record(tmp_path) == record
    expects_traceback = not isinstance(fault, Diverged | MethodError)
    assert (tmp_path / "error.txt").exists() == expects_traceback


def test_an_interrupt_is_not_a_failure_and_leaves_no_record(
    cell: Cell, tmp_path: Path, training: Callable[[Callable[..., Any]], None]
) -> None:
    def interrupt(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    training(interrupt)
    lay(cell, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_cell(tmp_path)
    assert not (tmp_path / "record.json").exists()


def test_a_finished_cell_is_not_trained_again(
    cell: Cell, tmp_path: Path, training: Callable[[Callable[..., Any]], None]
) -> None:
    training(lambda *args, **settings: pytest.fail("trained again"))
    lay(cell, tmp_path)
    finish(cell, tmp_path)
    assert run_cell(tmp_path).status == "ok"


def test_a_record_of_another_recipe_does_not_count_as_finished(cell: Cell, tmp_path: Path) -> None:
    finish(cell, tmp_path)
    assert finished(tmp_path, cell.recipe) is not None
    assert finished(tmp_path, suite(seeds=[1]).cells()[0].recipe) is None
    (tmp_path / "record.json").write_text('{"torn')
    assert finished(tmp_path, cell.recipe) is None


def test_a_cell_that_another_process_runs_is_left_to_it(cell: Cell, tmp_path: Path) -> None:
    folder = tmp_path / cell.name
    lay(cell, folder)
    with holding(folder, wait=False) as held:
        assert held
        assert cell_module.main([str(folder)]) == BUSY
    assert not (folder / "record.json").exists()


def test_a_locked_cell_is_waited_for_and_its_result_taken(cell: Cell, tmp_path: Path) -> None:
    folder = tmp_path / "cells" / cell.name
    folder.mkdir(parents=True)
    lock = holding(folder, wait=False)
    lock.__enter__()
    said: list[str] = []

    def other_harness_finishes(text: str) -> None:
        said.append(text)
        if "another process runs it" in text:
            finish(cell, folder)
            lock.__exit__(None, None, None)

    (result,) = run_suite(suite(), tmp_path, report_progress=other_harness_finishes)
    assert (result.status, result.ran) == ("ok", False)
    assert said == ["lora seed 0: another process runs it", "[1/1] lora seed 0: ok, finished before"]


# With real processes.


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CellResult]]:
    """A suite of one cell that trains and one whose method cannot work on its backbone, run once."""
    out = tmp_path_factory.mktemp("suite")
    return out, run_suite(mixed(), out, report_progress=silent)


def mixed() -> Suite:
    return suite(variants={"lora": {}, "lost": {"method.targets": ["no_such_layer"]}})


@pytest.mark.slow
def test_a_cell_trains_in_a_process_of_its_own_and_leaves_a_record(ran: tuple[Path, list[CellResult]]) -> None:
    out, (result, _) = ran
    assert (result.status, result.ran) == ("ok", True), (result.folder / "cell.log").read_text()
    metric = read_record(result.folder).metrics["accuracy"]
    assert metric.n == 8
    assert metric.value in [hits / 8 for hits in range(9)]
    assert (out / "cells" / result.cell.name / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_what_a_method_refuses_at_run_time_is_a_row_with_its_reason(ran: tuple[Path, list[CellResult]]) -> None:
    out, (_, result) = ran
    assert result.status == "failed"
    assert result.record.error is not None
    assert "no_such_layer" in result.record.error
    assert "no_such_layer" in (out / "report.md").read_text()


@pytest.mark.slow
def test_a_suite_leaves_a_report_of_all_its_cells(ran: tuple[Path, list[CellResult]]) -> None:
    out, _ = ran
    assert {path.name for path in out.iterdir()} == {
        *("suite.yaml", "cells.json", "cells", "results.csv", "results.parquet"),
        *("report.md", "report.html", "scatter.png"),
    }
    assert [(row.variant, row.status) for row in read_cells([out])] == [("lora", "ok"), ("lost", "failed")]


@pytest.mark.slow
def test_a_finished_cell_is_kept_and_a_failed_one_run_again(ran: tuple[Path, list[CellResult]]) -> None:
    out, (good, bad) = ran
    before = {result.folder: (result.folder / "record.json").stat().st_mtime_ns for result in (good, bad)}
    again = run_suite(mixed(), out, report_progress=silent)
    assert [(result.status, result.ran) for result in again] == [("ok", False), ("failed", True)]
    after = {result.folder: (result.folder / "record.json").stat().st_mtime_ns for result in again}
    assert after[good.folder] == before[good.folder]
    assert after[bad.folder] > before[bad.folder]


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A harness in a process of its own, whose one cell would train for long."""
    long = suite(always={"training.max_steps": 100000, "training.epochs": 100000})
    code = (
        "import json, pathlib, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the tests may run deaf to it, in the background
        "from peftkit.bench.suite import build_suite\n"
        "from peftkit.bench.executor import run_suite\n"
        "run_suite(build_suite(json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]), report_progress=print)"
    )
    command = [sys.executable, "-c", code, long.model_dump_json(), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_harness_that_ends_takes_its_cell_with_it_and_leaves_the_folder_resumable(
    number: signal.Signals, harness: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    child = until(lambda: cell_process(harness.pid))
    harness.send_signal(number)
    assert harness.wait(PATIENCE) == -number
    until(lambda: not psutil.pid_exists(child.pid))
    (folder,) = (path for path in (tmp_path / "cells").iterdir() if path.is_dir())
    with holding(folder, wait=False) as held:
        assert held
    assert not (folder / "record.json").exists()
    assert (folder / "recipe.yaml").exists()


@pytest.mark.slow
def test_a_process_that_ends_before_it_can_say_why_is_a_failure_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pydantic.py").write_text("raise ImportError('this pydantic is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (result,) = run_suite(suite(), tmp_path / "out", report_progress=silent)
    assert result.status == "failed"
    assert "ended with code 1 and no record" in str(result.record.error)
    assert "this pydantic is broken" in str(result.record.error)
