"""One cell in one fresh process: `python -m peftkit.bench.cell CELL_FOLDER`.

The folder holds `recipe.yaml`; afterwards it holds `record.json`, whatever happened, unless the process was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from peftkit.bench.devices import require_idle
from peftkit.digests import digests_of
from peftkit.errors import DeviceBusy, Diverged, InputError, OutOfMemory, PeftkitError
from peftkit.files import remove_leftovers, write_json, write_text
from peftkit.folder import RECIPE_NAME
from peftkit.recipe import Recipe, build_recipe, read_yaml
from peftkit.record import RECORD_NAME, Digests, RunRecord, Status, bare_record, read_record

LOG_NAME = "cell.log"
ERROR_NAME = "error.txt"
DIGESTS_NAME = "digests.json"
"""What the work in the folder came from, so that it is not taken up with other data or code."""
BUSY = 75
"""Exit code when another process runs this cell (EX_TEMPFAIL of sysexits.h)."""
UNAVAILABLE = 69
"""Exit code when the device's memory is in use (EX_UNAVAILABLE)."""
SECONDS_TO_STOP = 30.0
"""How long an interrupted cell may take to end before it is killed."""


@contextmanager
def holding(folder: Path, *, wait: bool, cancelled: threading.Event | None = None) -> Iterator[bool]:
    """Hold a cell's lock, which lies beside its folder. Yields False, at once unless `wait`, when another has it.

    Args:
        cancelled: ends the waiting.
    """
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    while True:
        try:
            lock.acquire(timeout=1.0 if wait else 0.0)
            break
        except Timeout:
            if not wait or (cancelled is not None and cancelled.is_set()):
                yield False
                return
    try:
        yield True
    finally:
        lock.release()


def finished(folder: Path, recipe: Recipe, *, keep_old: bool = False) -> RunRecord | None:
    """The record of a cell that ended well with this recipe, this data and this code; None when it is to be run.

    Args:
        keep_old: other code counts as well, other data never does.
    """
    record = current_record(folder, recipe.digest)
    if record is None or record.status != "ok":
        return None
    changes = outdated(record, digests_of(recipe))
    return record if not changes or (keep_old and changes == ["code"]) else None


def outdated(record: RunRecord, now: Digests) -> list[str]:
    """What a record was made with that is not so any more: `data`, `code`."""
    before = record.digests or Digests(data="", code="")
    return [name for name in ("data", "code") if getattr(before, name) != getattr(now, name)]


def current_record(folder: Path, digest: str) -> RunRecord | None:
    """The record of this recipe's latest end, good or bad; None when there is none that can be read."""
    try:
        record = read_record(folder)
    except InputError:
        return None
    return record if record.recipe_digest == digest else None


def clear_failure(folder: Path) -> None:
    """Remove what an earlier, failed end of the cell left, so that the next end is told from it."""
    for name in (RECORD_NAME, ERROR_NAME):
        (folder / name).unlink(missing_ok=True)


def make_ready(folder: Path, recipe: Recipe) -> None:
    """Leave of earlier tries what a run may go on from: nothing of other data or code, no failure, no half of a file.

    To be called by whoever holds the cell.
    """
    now = digests_of(recipe)
    try:
        before = Digests.model_validate(json.loads((folder / DIGESTS_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        before = None
    if before != now:
        for path in sorted(folder.iterdir()):
            if path.name in (RECIPE_NAME, LOG_NAME):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(folder / DIGESTS_NAME, now.model_dump())
    clear_failure(folder)
    remove_leftovers(folder)


def run_cell(folder: Path, *, inference: bool = False, even_if_busy: bool = False) -> RunRecord:
    """Train what the folder's recipe says, from its newest checkpoint; a failure becomes a record with its reason.

    Args:
        inference: measure afterwards how fast it answers.
        even_if_busy: start where the device's memory is in use, too.

    Raises:
        InputError: the folder's recipe cannot be read, or the folder cannot be written.
    """
    recipe = build_recipe(read_yaml(folder / RECIPE_NAME), where=str(folder / RECIPE_NAME))
    done = finished(folder, recipe)
    if done is not None:
        return done
    make_ready(folder, recipe)
    try:
        if not even_if_busy:
            require_idle()
        from peftkit.run import train

        return train(recipe, folder, resume=True, inference=inference, only_if_free=not even_if_busy)
    except Exception as fault:  # the cell boundary: one cell's failure is a row of the report, not the end of the suite
        if not isinstance(fault, PeftkitError):
            write_text(folder / ERROR_NAME, "".join(traceback.format_exception(fault)))
        told = current_record(folder, recipe.digest)
        if told is not None and told.status != "ok":
            return told
        from peftkit.environment import describe_environment

        record = bare_record(recipe, _status(fault), _reason(fault), environment=describe_environment())
        record.write(folder)
        if isinstance(fault, DeviceBusy):
            raise
        return record


def _status(fault: Exception) -> Status:
    if isinstance(fault, Diverged):
        return "diverged"
    from peftkit.train.retry import is_out_of_memory

    return "oom" if isinstance(fault, OutOfMemory) or is_out_of_memory(fault) else "failed"


def _reason(fault: Exception) -> str:
    if isinstance(fault, PeftkitError):
        return str(fault)
    return f"{type(fault).__name__}: {fault} (traceback in {ERROR_NAME})"


def _stop_with_parent() -> None:
    """Interrupt this process when the harness that started it is gone: its end of our standard input closes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    watched = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # what this process starts must not inherit the pipe
    os.close(nothing)

    def watch() -> None:
        import _thread

        if os.read(watched, 1) == b"":
            _thread.interrupt_main()
            time.sleep(SECONDS_TO_STOP)  # it may be deep in a kernel that hears of no interrupt
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one cell: 0 when it ended well, 1 when its record says otherwise, `BUSY` when another process runs it."""
    parser = argparse.ArgumentParser(prog="python -m peftkit.bench.cell", description=run_cell.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--with-parent", action="store_true", help="stop when standard input closes")
    parser.add_argument("--inference", action="store_true", help="measure how fast the result answers")
    parser.add_argument("--even-if-busy", action="store_true", help="start where the device's memory is in use, too")
    options = parser.parse_args(arguments)
    if options.with_parent:
        _stop_with_parent()
    with holding(options.folder, wait=False) as held:
        if not held:
            return BUSY
        try:
            record = run_cell(options.folder, inference=options.inference, even_if_busy=options.even_if_busy)
        except PeftkitError as fault:
            print(fault, file=sys.stderr)
            return UNAVAILABLE if isinstance(fault, DeviceBusy) else fault.exit_code
    print(f"{record.status}{f': {record.error}' if record.error else ''}")
    return 0 if record.status == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
