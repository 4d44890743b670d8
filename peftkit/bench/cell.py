"""One cell in one fresh process: `python -m peftkit.bench.cell CELL_FOLDER`.

The folder holds `recipe.yaml`; afterwards it holds `record.json`, whatever happened, unless the process was killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from peftkit.errors import Diverged, InputError, OutOfMemory, PeftkitError
from peftkit.files import write_text
from peftkit.folder import RECIPE_NAME
from peftkit.recipe import build_recipe, read_yaml
from peftkit.record import RECORD_NAME, RunRecord, Status, bare_record, read_record

ERROR_NAME = "error.txt"
BUSY = 75
"""Exit code when another process runs this cell (EX_TEMPFAIL of sysexits.h)."""


@contextmanager
def holding(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a cell's lock, which lies beside its folder. Yields False, at once unless `wait`, when another has it."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def finished(folder: Path, digest: str) -> RunRecord | None:
    """The record of a cell that ended well with this recipe; None when the cell is to be run."""
    record = current_record(folder, digest)
    return record if record is not None and record.status == "ok" else None


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


def run_cell(folder: Path) -> RunRecord:
    """Train what the folder's recipe says, from its newest checkpoint; a failure becomes a record with its reason.

    Raises:
        InputError: the folder's recipe cannot be read, or the folder cannot be written.
    """
    recipe = build_recipe(read_yaml(folder / RECIPE_NAME), where=str(folder / RECIPE_NAME))
    done = finished(folder, recipe.digest)
    if done is not None:
        return done
    clear_failure(folder)
    try:
        from peftkit.run import train

        return train(recipe, folder, resume=True)
    except Exception as fault:  # the cell boundary: one cell's failure is a row of the report, not the end of the suite
        if not isinstance(fault, PeftkitError):
            write_text(folder / ERROR_NAME, "".join(traceback.format_exception(fault)))
        told = current_record(folder, recipe.digest)
        if told is not None and told.status != "ok":
            return told
        from peftkit.environment import describe_environment

        record = bare_record(recipe, _status(fault), _reason(fault), environment=describe_environment())
        record.write(folder)
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

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one cell: 0 when it ended well, 1 when its record says otherwise, `BUSY` when another process runs it."""
    parser = argparse.ArgumentParser(prog="python -m peftkit.bench.cell", description=run_cell.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--with-parent", action="store_true", help="stop when standard input closes")
    options = parser.parse_args(arguments)
    if options.with_parent:
        _stop_with_parent()
    with holding(options.folder, wait=False) as held:
        if not held:
            return BUSY
        try:
            record = run_cell(options.folder)
        except PeftkitError as fault:
            print(fault, file=sys.stderr)
            return fault.exit_code
    print(f"{record.status}{f': {record.error}' if record.error else ''}")
    return 0 if record.status == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
