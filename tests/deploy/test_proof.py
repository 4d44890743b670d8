"""The proof runs in a process of its own; merges that end halfway leave nothing that looks whole."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peftkit.cli import main
from peftkit.deploy import proof as proving
from peftkit.deploy.merge import merge
from peftkit.deploy.proof import recorded_digests, verify_models
from peftkit.deploy.shards import ShardWriter
from peftkit.deploy.verification import Question
from peftkit.errors import InputError, OutOfMemory, OutputError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import kill_merge

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter, merged."""
    home = kill_merge.lay(tmp_path_factory.mktemp("home"), **SMALL)
    assert kill_merge.run(home, "merge") == 0
    (home / "outputs" / "model").rename(home / "merged")
    return home


def test_a_fresh_process_proves_from_the_files_and_the_verb_tells(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["verify", str(home / "adapter"), str(home / "merged"), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["verification"]["passed"] is True
    assert found["verification"]["changed_tensors"] == 14
    assert "asking the candidate, read back from disk" in printed.err


def test_the_verb_exits_1_where_the_answers_differ_and_2_where_the_question_is_wrong(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "prove", proving.examine)
    assert main(["verify", str(home / "adapter"), str(home / "base")]) == 1
    assert "no tensor differs from the base: the adapter was not folded" in capsys.readouterr().out
    assert main(["verify", str(home / "adapter"), str(tmp_path / "nowhere")]) == 2
    assert main(["verify", str(tmp_path), str(home / "merged")]) == 2
    assert "is no run, no adapter and no model folder" in capsys.readouterr().err


def test_two_models_are_compared_without_any_adapter(home: Path) -> None:
    same = proving.examine(Question(reference=str(home / "merged"), candidate=str(home / "merged"))).verification
    assert same.passed
    assert same.difference is not None
    assert same.difference.max_abs_logit == 0.0
    other = proving.examine(Question(reference=str(home / "merged"), candidate=str(home / "base"))).verification
    assert not other.passed


def test_the_digests_of_a_merge_are_found_again(home: Path, tmp_path: Path) -> None:
    assert recorded_digests(home / "merged").keys() == {path.name for path in (home / "base").glob("*.safetensors")}
    assert recorded_digests(tmp_path) == {}


def test_a_process_that_was_killed_is_told_with_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, said = subprocess.Popen, list[str]()
    code = f"import os, sys; sys.stdin.readline(); print('at work', flush=True); os.kill(os.getpid(), {signal.SIGKILL})"
    monkeypatch.setattr(
        proving.subprocess, "Popen", lambda command, **settings: real([sys.executable, "-c", code], **settings)
    )
    with pytest.raises(OutOfMemory, match="--streamed"):
        verify_models(home / "adapter", home / "merged", say=said.append)
    assert said == ["at work"]


def test_what_the_process_raises_is_raised_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    told = json.dumps({"fault": "InputError", "message": "no such base"})
    code = f"import sys; open(sys.argv[1], 'w').write({told!r})"
    monkeypatch.setattr(
        proving.subprocess,
        "Popen",
        lambda command, **settings: real([sys.executable, "-c", code, command[-1]], **settings),
    )
    with pytest.raises(InputError, match="no such base"):
        verify_models(home / "adapter", home / "merged")


@pytest.mark.parametrize("what", ["merge", "gguf"])
def test_what_is_killed_or_finds_its_disk_full_leaves_the_input_whole_and_no_half_output(what: str, home: Path) -> None:
    for row in (kill_merge.kill_all(home, 3, seed=1, what=what), kill_merge.fill_all(home, 2, seed=1, what=what)):
        assert {fault: row[fault] for fault in kill_merge.FAULTS} == dict.fromkeys(kill_merge.FAULTS, "0")
        assert int(row["ended early"]) > 0


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardWriter._put

    def put(writer: ShardWriter, content: memoryview) -> None:
        if writer._left == []:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(writer, content)

    monkeypatch.setattr(ShardWriter, "_put", put)
    with pytest.raises(OutputError, match="No space left on device"):
        merge(home / "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_works_in_is_not_taken_for_stale(home: Path, tmp_path: Path) -> None:
    from peftkit.files import STAGING_PREFIX, staged_folder

    (tmp_path / f"{STAGING_PREFIX}out-left").mkdir()
    (tmp_path / f"{STAGING_PREFIX}other-left").mkdir()
    with staged_folder(tmp_path / "out") as mine:
        with staged_folder(tmp_path / "out") as other:
            assert mine.is_dir()
            (other / "theirs").touch()
        (mine / "mine").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{STAGING_PREFIX}other-left", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
