"""Files appear whole or not at all, between processes too."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from peftkit import cache
from peftkit.cache import Package, build_once, fetch
from peftkit.errors import InputError, OutputError
from peftkit.files import STAGING_PREFIX, append_json_line, staged_folder, write_json, write_text


def test_a_failed_build_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    def broken(staging: Path) -> None:
        (staging / "half").write_text("half")
        raise ValueError("cut short")

    with pytest.raises(ValueError, match="cut short"):
        build_once(tmp_path / "made", broken)
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob(STAGING_PREFIX + "*"))
    made = build_once(tmp_path / "made", lambda staging: (staging / "whole").write_text("whole") and None)
    assert (made / "whole").read_text() == "whole"


def _build_slowly(folder: Path, tally: Path) -> None:
    def build(staging: Path) -> None:
        append_json_line(tally, os.getpid())
        for number in range(50):
            (staging / str(number)).write_text("x" * 10_000)

    build_once(folder, build)
    assert len(list(folder.iterdir())) == 50


def test_two_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    tally = tmp_path / "tally"
    workers = [context.Process(target=_build_slowly, args=(tmp_path / "made", tally)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(tally.read_text().splitlines()) == 1


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_HOME", str(tmp_path))
    wrong = Package("chatterbot-corpus", "1.3.3", "chatterbot_corpus-1.3.3-py2.py3-none-any.whl", "0" * 64, "BSD")
    with pytest.raises(InputError, match="is not the pinned file"):
        fetch(wrong)
    assert not (tmp_path / "packages" / "chatterbot-corpus-1.3.3").exists()


def test_a_package_that_cannot_be_had_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"cannot fetch .*PEFTKIT_HOME"):
        fetch(Package("chatterbot-corpus", "1.3.3", "x.whl", "0" * 64, "BSD"))


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert cache.file_sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_write_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy() -> None:
    with pytest.raises(OutputError, match=r"cannot write /proc/nothing/file.*--out"):
        write_text(Path("/proc/nothing/file"), "x")


def test_a_staged_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with staged_folder(tmp_path / "out") as staging:
            (staging / content).write_text(content)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert not list(tmp_path.glob(STAGING_PREFIX + "*"))


def test_a_built_folder_is_not_built_again(tmp_path: Path) -> None:
    build_once(tmp_path / "made", lambda staging: (staging / "stamp").write_text(str(time.time_ns())) and None)
    first = (tmp_path / "made" / "stamp").read_text()
    build_once(tmp_path / "made", lambda staging: (staging / "stamp").write_text("again") and None)
    assert (tmp_path / "made" / "stamp").read_text() == first
