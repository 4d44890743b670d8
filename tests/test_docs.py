"""The documents are generated from committed results, and what they show runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from peftkit.bench.suite import load_suite
from peftkit.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent


def test_results_and_the_readmes_table_are_those_of_the_committed_runs() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/publish.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_file_and_verb_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / name).exists(), name
    for verb in re.findall(r"^\$? ?peftkit (\w+)", text, flags=re.MULTILINE):
        assert verb in VERBS, verb
    for recipe in re.findall(r"recipes/[\w.-]+\.yaml", text):
        assert (ROOT / recipe).exists(), recipe


def test_the_readme_shows_the_two_commands_first() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("make ")]
    assert [line.split()[:2] for line in lines[:2]] == [["make", "demo"], ["make", "test"]]


def test_every_committed_suite_expands_into_valid_recipes() -> None:
    suites = sorted((ROOT / "benchmarks").glob("*.yaml"))
    assert suites
    for suite in suites:
        assert load_suite(suite).cells()
