"""`peftkit compare` and `peftkit report --reference` from outside: exit codes, one document, one message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from peftkit.cli import main
from peftkit.files import write_json, write_json_lines
from peftkit.record import Metric, RunRecord

N = 400
HARD = np.random.default_rng(0).normal(size=N)


def run(folder: Path, level: float, seed: int = 0, *, n: int = N, digest: str = "0" * 16) -> Path:
    """A finished run that gets the examples right which are easier than `level`."""
    right = (HARD + 0.3 * np.random.default_rng([seed, 7]).normal(size=N) < level)[:n]
    rows = [{"row": i, "label": 1, "prediction": int(hit), "scores": [0.5, 0.5]} for i, hit in enumerate(right)]
    write_json_lines(folder / "predictions.jsonl", rows)
    RunRecord(
        peftkit_version="0.1.0",
        recipe={},
        recipe_digest=digest,
        label="lora",
        seed=seed,
        status="ok",
        environment={},
        metrics={"accuracy": Metric(value=float(right.mean()), n=n)},
    ).write(folder)
    return folder


def suite(folder: Path, *, reference: str | None = None, **levels: float) -> Path:
    """A finished benchmark of three seeds a variant."""
    cells = []
    for variant, level in levels.items():
        for seed in range(3):
            run(folder / "cells" / f"{variant}-{seed}", level, seed)
            listed = {"name": f"{variant}-{seed}", "variant": variant, "seed": seed, "recipe_digest": "0" * 16}
            cells.append(listed)
    named = {} if reference is None else {"reference": reference}
    write_json(folder / "cells.json", {"suite": "s", "cells": cells, **named})
    return folder


def refused(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    code = main([str(argument) for argument in arguments])
    caught = capsys.readouterr()
    assert (code, caught.out) == (2, "")
    assert len(caught.err.splitlines()) == 1
    return caught.err


def test_a_worse_run_ends_with_1_and_a_better_or_equal_one_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = str(run(tmp_path / "good", 1.0)), str(run(tmp_path / "bad", 0.5))
    assert main(["compare", good, bad]) == 1
    header, line = capsys.readouterr().out.splitlines()
    assert header == "points of accuracy against good, 400 examples and 1 seed in pairs:"
    assert line.startswith("bad  -")
    assert line.endswith("worse, p < 0.001")
    assert main(["compare", bad, good]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("better, p < 0.001")
    assert main(["compare", good, good]) == 0
    assert "the same on every example" in capsys.readouterr().out


def test_json_is_one_document_with_the_regressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run(tmp_path / "a", 1.0)), str(run(tmp_path / "b", 0.5)), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["regressions"] == ["b"]
    (found,) = document["differences"]
    assert found["reference"] == "a"
    assert found["low"] < found["value"] < found["high"] < 0
    assert found["num_examples"] == 400
    assert found["verdict"].startswith("worse than a by ")


def test_suites_are_compared_variant_by_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = suite(tmp_path / "before", lora=1.0, full=1.2, gone=0.5)
    after = suite(tmp_path / "after", lora=1.0, full=0.6, new=0.5)
    assert main(["compare", str(before), str(after), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [(found["variant"], found["outcome"]) for found in document["differences"]] == [
        ("lora", "undecided"),
        ("full", "worse"),
    ]
    assert document["regressions"] == ["full"]
    absent = "no finished run (not there)."
    assert document["left_out"] == {"gone": absent, "new": f"in {before}, {absent}"}
    assert document["differences"][0]["paired_seeds"]


def test_wrong_input_is_one_message_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, short = run(tmp_path / "one", 1.0), run(tmp_path / "short", 1.0, n=300)
    bare = run(tmp_path / "bare", 1.0)
    (bare / "predictions.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    whole = suite(tmp_path / "suite", lora=1.0)
    assert "is not a folder" in refused("compare", one, tmp_path / "none", capsys=capsys)
    assert "holds no finished run" in refused("compare", one, tmp_path / "empty", capsys=capsys)
    assert "its 300 test rows are not the 400 of one" in refused("compare", one, short, capsys=capsys)
    assert "was not scored on a test split" in refused("compare", bare, one, capsys=capsys)
    assert "did you mean 'accuracy'" in refused("compare", one, one, "--metric", "acuracy", capsys=capsys)
    assert "Name two runs, or two folders of a benchmark" in refused("compare", one, whole, capsys=capsys)


def test_runs_that_decide_by_different_metrics_need_one_to_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, talk = run(tmp_path / "one", 1.0), tmp_path / "talk"
    write_json_lines(talk / "predictions.jsonl", [{"row": 0, "loss": 1.0, "tokens": 2, "correct": 1}])
    document = json.loads((one / "record.json").read_text())
    document["metrics"] = {"token_accuracy": {"value": 0.5, "n": 1}}
    write_json(talk / "record.json", document)
    told = refused("compare", one, talk, capsys=capsys)
    assert "no deciding metric (accuracy, token_accuracy). Name one with --metric." in told
    told = refused("compare", one, talk, "--metric", "accuracy", capsys=capsys)
    assert "its predictions tell token_accuracy" in told


def test_the_report_compares_with_the_variant_that_is_named_or_the_suites_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(suite(tmp_path / "s", reference="full", lora=1.0, full=1.2, head=0.2))
    assert main(["report", folder]) == 0
    assert "points of accuracy against full, 400 examples and 3 seeds in pairs:" in capsys.readouterr().out
    assert main(["report", folder, "--reference", "head"]) == 0
    assert "against head" in capsys.readouterr().out
    assert "did you mean 'head'" in refused("report", folder, "--reference", "haed", capsys=capsys)
    assert "leave --reference out" in refused("report", folder, "--reference", "head", "--json", capsys=capsys)
