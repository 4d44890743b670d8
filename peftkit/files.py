"""The one place that writes files: aside, synced, then renamed, so that a reader sees the whole or nothing."""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkit.errors import OutputError

STAGING_PREFIX = ".partial-"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an `OutputError` that names the path and the remedy."""
    try:
        yield
    except OSError as fault:
        reason = fault.strerror or str(fault)
        raise OutputError(f"cannot write {path}: {reason}. Choose another --out, or free space there.") from fault


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically; parents are made.

    Raises:
        OutputError: no space, no permission, or a file where a folder is needed.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, atomically; parents are made.

    Raises:
        OutputError: no space, no permission, or a file where a folder is needed.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=STAGING_PREFIX, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, document: Any) -> None:
    """Write one JSON document, indented, atomically. NaN is refused: what was not measured is an absent key."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON document a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends, and vanishes when it fails.

    An existing `path` is replaced. Files in the folder are synced before the rename. What processes that were killed
    have left beside `path` is removed first: their hold on it ended with them.

    Raises:
        OutputError: no space or no permission.
    """
    path = path.absolute()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(path)
        staging = Path(tempfile.mkdtemp(prefix=_staging_prefix(path), dir=path.parent))
        hold = _hold(staging)
        try:
            yield staging
            for file in sorted(staging.rglob("*")):
                if file.is_file():
                    file.chmod(0o644)
                    sync_file(file)
            staging.chmod(0o755)
            if path.exists():
                retired = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=path.parent))
                os.replace(path, retired / path.name)
                os.replace(staging, path)
                shutil.rmtree(retired, ignore_errors=True)
            else:
                os.replace(staging, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if hold is not None:
                os.close(hold)


def _staging_prefix(path: Path) -> str:
    return f"{STAGING_PREFIX}{path.name}-"


def _clear_stale(path: Path) -> None:
    """Remove staging folders of `path` that no living process holds."""
    for stale in path.parent.glob(f"{glob.escape(_staging_prefix(path))}*"):
        hold = _hold(stale)
        if hold is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(hold)


def _hold(folder: Path) -> int | None:
    """A handle that holds a folder until it is closed, or this process has ended; None where another process holds it,
    it is gone, or the system knows no such hold."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        hold = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(hold)
        return None
    return hold


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left aside in a folder and below it; nobody may be writing there."""
    for leftover in sorted(folder.rglob(f"{STAGING_PREFIX}*"), reverse=True):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_json_line(path: Path, row: Any) -> None:
    """Add one JSON document as a line; a torn last line is what a power cut can leave, and readers drop it."""
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
