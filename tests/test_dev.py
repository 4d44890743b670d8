"""scripts/dev.py decides rightly when `.venv` can be used, and the doors into it are one line each."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
DIGEST = "d" * 64


@pytest.fixture
def dev() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("dev", ROOT / "scripts" / "dev.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dev"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["dev"]


def make_venv(dev: ModuleType, folder: Path, *, digest: str = DIGEST, extras: tuple[str, ...] = ("dev",)) -> Path:
    venv = folder / ".venv"
    python = dev.python_of(venv)
    python.parent.mkdir(parents=True)
    python.write_text("")
    (venv / dev.STAMP).write_text(json.dumps({"digest": digest, "extras": list(extras)}))
    return venv


def test_no_environment_is_missing(dev: ModuleType, tmp_path: Path) -> None:
    assert dev.examine(tmp_path / ".venv", DIGEST, ()) == "missing"


def test_a_stamp_that_matches_is_whole(dev: ModuleType, tmp_path: Path) -> None:
    venv = make_venv(dev, tmp_path)
    assert dev.examine(venv, DIGEST, ("dev",)) == "whole"
    assert dev.examine(venv, DIGEST, ()) == "whole"


def test_changed_requirements_and_absent_extras_are_stale(dev: ModuleType, tmp_path: Path) -> None:
    venv = make_venv(dev, tmp_path)
    assert dev.examine(venv, "e" * 64, ("dev",)) == "stale"
    assert dev.examine(venv, DIGEST, ("dev", "trackers")) == "stale"


def test_a_set_up_cut_short_is_never_whole(dev: ModuleType, tmp_path: Path) -> None:
    venv = make_venv(dev, tmp_path)
    (venv / dev.UNFINISHED).write_text((venv / dev.STAMP).read_text())
    assert dev.examine(venv, DIGEST, ("dev",)) == "half made"


def test_a_vanished_interpreter_is_half_made(dev: ModuleType, tmp_path: Path) -> None:
    venv = make_venv(dev, tmp_path)
    dev.python_of(venv).unlink()
    assert dev.examine(venv, DIGEST, ("dev",)) == "half made"


def test_an_environment_without_stamp_is_installed_over_and_not_thrown_away(dev: ModuleType, tmp_path: Path) -> None:
    venv = make_venv(dev, tmp_path)
    (venv / dev.STAMP).unlink()
    assert dev.examine(venv, DIGEST, ("dev",)) == "made by hand"


class Installs:
    """Stands in for `subprocess.run`: notes what the environment looked like at each command, and fails on one."""

    def __init__(self, dev: ModuleType, venv: Path, fails_on: str = "nothing") -> None:
        self.dev, self.venv, self.fails_on = dev, venv, fails_on
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        assert (self.venv / self.dev.UNFINISHED).is_file(), "whoever looks now must see that it is half made"
        assert not (self.venv / self.dev.STAMP).exists()
        python = self.dev.python_of(self.venv)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text("")
        return subprocess.CompletedProcess(command, 1 if self.fails_on in command else 0)


def test_set_up_stamps_last_and_then_does_nothing(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / ".venv"
    installs = Installs(dev, venv)
    monkeypatch.setattr(dev.subprocess, "run", installs)
    assert dev.prepare(venv, ("dev", "trackers")) == 0
    make, install = installs.commands
    assert make[1:] == ["-m", "venv", str(venv)]
    assert install[1:] == [
        *("-m", "pip", "install", "--disable-pip-version-check"),
        *("-c", "constraints.txt", "-e", ".[dev,trackers]"),
    ]
    assert dev.examine(venv, dev.inputs_digest(ROOT), ("dev", "trackers")) == "whole"
    assert dev.prepare(venv, ("dev",)) == 0
    assert len(installs.commands) == 2


def test_failed_set_up_leaves_no_stamp_and_starts_anew(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / ".venv"
    monkeypatch.setattr(dev.subprocess, "run", Installs(dev, venv, fails_on="pip"))
    assert dev.prepare(venv, ()) == 1
    assert dev.examine(venv, dev.inputs_digest(ROOT), ()) == "half made"
    (venv / "leftover").write_text("")
    monkeypatch.setattr(dev.subprocess, "run", Installs(dev, venv))
    assert dev.prepare(venv, ()) == 0
    assert not (venv / "leftover").exists()


def test_more_extras_are_added_to_those_already_there(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = make_venv(dev, tmp_path, digest=dev.inputs_digest(ROOT), extras=("export",))
    installs = Installs(dev, venv)
    monkeypatch.setattr(dev.subprocess, "run", installs)
    assert dev.prepare(venv, ("dev",)) == 0
    assert installs.commands[-1][-1] == ".[dev,export]"


def test_the_digest_sees_both_files(dev: ModuleType, tmp_path: Path) -> None:
    digests = set()
    for project, pins in (("a", "b"), ("a", "c"), ("d", "b"), ("ab", "")):
        (tmp_path / "pyproject.toml").write_text(project)
        (tmp_path / "constraints.txt").write_text(pins)
        digests.add(dev.inputs_digest(tmp_path))
    assert len(digests) == 4


def test_a_kept_answer_is_made_again_when_its_source_is_newer(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    (tmp_path / "model").write_text("")
    answers = iter(["first\n", "second\n"])
    monkeypatch.setattr(
        dev.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, next(answers).encode())
    )
    step = dev.Step("After:", ("generate",), "answer.txt", "model")
    assert dev.show_kept(step) == dev.show_kept(step) == 0
    assert capfd.readouterr().out == "first\nfirst\n"
    newer = (tmp_path / "answer.txt").stat().st_mtime + 10
    os.utime(tmp_path / "model", (newer, newer))
    assert dev.show_kept(step) == 0
    assert capfd.readouterr().out == "second\n"


def test_an_unknown_command_is_refused(dev: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.main(["tset"]) == 2
    assert "demo | test | check | env" in capsys.readouterr().err


def test_every_make_target_is_one_call_of_dev() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    targets = [line.removesuffix(":") for line in lines if re.fullmatch(r"[a-z]+:", line)]
    assert targets == ["demo", "test"]
    expected = [".PHONY: demo test"]
    for target in targets:
        expected += [f"{target}:", f"\tpython3 scripts/dev.py {target}"]
    assert lines == expected


def test_the_checks_are_executable_and_ci_runs_the_tests() -> None:
    for script in (".ci/run", "scripts/check"):
        assert os.access(ROOT / script, os.X_OK)
        assert "set -euo pipefail" in (ROOT / script).read_text().splitlines()
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_dev_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse((ROOT / "scripts" / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_constraints_pin_everything_that_pyproject_asks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonical(pin.name): str(pin.specifier) for pin in pins}
    assert all(re.fullmatch(r"==[\w.]+", exact) for exact in pinned.values()), "exact versions, without local parts"
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(text) for text in [*project["dependencies"], *extras["dev"], *extras["export"], *extras["trackers"]]
    ]
    for requirement in wanted:
        if requirement.name != "pip":  # an environment's own pip is as good as any
            version = pinned[canonical(requirement.name)].removeprefix("==")
            assert requirement.specifier.contains(version), f"{requirement} against the pin {version}"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
