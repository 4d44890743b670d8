#!/usr/bin/env python3
"""Set up peftkit in `.venv` and run it: `python3 scripts/dev.py demo | test | check | env`. Standard library only.

`.venv` carries a stamp: a digest of pyproject.toml and constraints.txt, and the extras that are in it. Without the
stamp's match it is brought up to date first. While that runs the stamp has another name, so that an environment whose
set-up was cut short is made again from nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
STAMP, UNFINISHED = "peftkit-stamp.json", "peftkit-unfinished.json"

TESTED = ("dev", "export", "ray", "serve", "trackers")
EXTRAS = {"demo": (), "test": TESTED, "check": TESTED, "env": TESTED}
SETTINGS = {"TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # for each of the two processes that run tests

PROMPT = "Who are you, and what do you like?"
SHORT = ("--max-new-tokens", "48")
DEMO, CHAT, MERGED = "runs/demo", "runs/demo-chat", "runs/demo-chat-merged"


class Step(NamedTuple):
    """One command of the demo. With `keep`, its output is kept there and shown again while newer than `source`."""

    title: str
    arguments: tuple[str, ...]
    keep: str = ""
    source: str = ""


BENCH = ("bench", "benchmarks/demo.yaml", "--out", DEMO)
DEMO_STEPS = (
    Step("1/4  Every method on one encoder: film reviews, good or bad", BENCH),
    Step("2/4  A short chat LoRA of SmolLM2-135M", ("train", "recipes/demo-chat.yaml", "--out", CHAT)),
    Step(
        "3/4  Fold the adapter into the model, and prove it",
        ("merge", CHAT, "--out", MERGED),
        f"{CHAT}/merge.txt",
        f"{CHAT}/record.json",
    ),
    Step(
        f"4/4  {PROMPT}  Before:",
        ("generate", "smollm2-135m", PROMPT, *SHORT),
        f"{CHAT}/before.txt",
        "recipes/demo-chat.yaml",
    ),
    Step("     After:", ("generate", MERGED, PROMPT, *SHORT), f"{CHAT}/after.txt", f"{MERGED}/merge_report.json"),
    Step("The table again", ("report", DEMO)),
)
CHECKS = (("ruff", "format", "--check", "."), ("ruff", "check", "."), ("mypy",))
TESTS = ("pytest", "-n", "2", "--dist", "loadfile")


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] not in EXTRAS:
        print(f"usage: python3 scripts/dev.py {' | '.join(EXTRAS)} [arguments of pytest]", file=sys.stderr)
        return 2
    command, rest = arguments[0], arguments[1:]
    code = prepare(ROOT / ".venv", EXTRAS[command])
    if code != 0 or command == "env":
        return code
    if command == "demo":
        return demo()
    if command == "check":
        for check in CHECKS:
            code = run(in_venv(*check), OFFLINE)
            if code != 0:
                return code
    return run(in_venv(*TESTS, *rest), OFFLINE | ONE_THREAD)


def prepare(venv: Path, extras: tuple[str, ...]) -> int:
    """Make `venv` whole: nothing when its stamp matches, an install over it when stale, a new one otherwise."""
    digest = inputs_digest(ROOT)
    condition = examine(venv, digest, extras)
    if condition == "whole":
        return 0
    if Path(sys.prefix).resolve() == venv.resolve():
        print(
            "dev.py cannot rebuild the environment it runs in: call it with a python3 from outside .venv",
            file=sys.stderr,
        )
        return 2
    print(f"Setting up {venv}: it is {condition}. A new one takes a few minutes, once.", flush=True)
    wanted = sorted({*extras, *read_stamp(venv).get("extras", [])})
    if condition == "stale":
        (venv / STAMP).replace(venv / UNFINISHED)
    elif condition != "made by hand":
        shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir(parents=True, exist_ok=True)
    (venv / UNFINISHED).write_text(json.dumps({"digest": digest, "extras": wanted}), encoding="utf-8")
    package = ".[{}]".format(",".join(wanted)) if wanted else "."
    install = [
        str(python_of(venv)),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-c",
        "constraints.txt",
        "-e",
    ]
    for step in ([sys.executable, "-m", "venv", str(venv)], [*install, package]):
        done = subprocess.run(step, cwd=str(ROOT), stdout=sys.stderr)
        if done.returncode != 0:
            print("Set-up failed; the next call starts it anew. Command: " + " ".join(step), file=sys.stderr)
            print("On Debian and Ubuntu, venv is in the package python3-venv.", file=sys.stderr)
            return 1
    (venv / UNFINISHED).replace(venv / STAMP)
    return 0


def examine(venv: Path, digest: str, extras: tuple[str, ...]) -> str:
    """`whole`, or what is the matter: `missing`, `half made`, `stale`, or `made by hand` (sound, but not by us)."""
    if not venv.exists():
        return "missing"
    if (venv / UNFINISHED).exists() or not python_of(venv).exists():
        return "half made"
    stamp = read_stamp(venv)
    if not stamp:
        return "made by hand"
    return "whole" if stamp["digest"] == digest and set(extras) <= set(stamp["extras"]) else "stale"


def read_stamp(venv: Path) -> dict:
    """What was installed, or nothing."""
    path = venv / STAMP
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def inputs_digest(root: Path) -> str:
    """Digest of the files that decide what is installed."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        content = (root / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def python_of(venv: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def in_venv(name: str, *arguments: str) -> list[str]:
    """The command line of a program that is installed in the environment."""
    return [str(python_of(ROOT / ".venv").with_name(name)), *arguments]


def run(command: list[str], settings: dict[str, str]) -> int:
    """Run a command in the checkout and return its exit code."""
    return subprocess.run(command, cwd=str(ROOT), env=environment(settings)).returncode


def environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's variables over our settings: whoever sets one means it."""
    return {**SETTINGS, **settings, **os.environ}


def demo() -> int:
    """Run the demo's steps in order, stopping at the first that fails, and say where its results lie."""
    for step in DEMO_STEPS:
        print(f"\n== {step.title}", flush=True)
        code = show_kept(step) if step.keep else run(in_venv("peftkit", *step.arguments), {})
        if code != 0:
            return code
    print("\n== Results")
    for plot in sorted((ROOT / DEMO).glob("*.png")):
        print(f"plot          {plot.relative_to(ROOT)}")
    print(f"merged model  {MERGED}")
    return 0


def show_kept(step: Step) -> int:
    """Print a step's kept output, made first unless it is newer than what it was made from."""
    kept, source = ROOT / step.keep, ROOT / step.source
    if not (kept.is_file() and kept.stat().st_mtime >= source.stat().st_mtime):
        done = subprocess.run(
            in_venv("peftkit", *step.arguments), cwd=str(ROOT), env=environment({}), stdout=subprocess.PIPE
        )
        if done.returncode != 0:
            return done.returncode
        aside = kept.with_suffix(".partial")
        aside.write_bytes(done.stdout)
        aside.replace(kept)
    print(kept.read_text(encoding="utf-8"), end="", flush=True)
    return 0


if __name__ == "__main__":
    if sys.version_info < OLDEST:
        found = ".".join(str(part) for part in sys.version_info[:3])
        sys.exit(
            f"peftkit needs Python 3.11 or newer, and this is {found}. Call a newer one: python3.12 scripts/dev.py ..."
        )
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
