"""`bench --dry-run`: what the cells take, and which do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkit.bench.preview import START_SECONDS
from peftkit.cli import main
from peftkit.recipe import dump_yaml


@pytest.fixture
def suite_file(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> Any:
    """Writes a suite of the tiny encoder and eight sentences; its path."""

    def write(**content: Any) -> Path:
        recipe = {
            "backbone": {"name": str(tiny_bert), "dtype": "float32"},
            "method": "lora",
            "task": "classify",
            "data": dict.fromkeys(("train", "validation", "test"), str(reviews_file)),
            "training": {"batch_size": 4, "budget": "16 examples"},
            "evaluation": {"every": 2},
        }
        path = tmp_path / "suite.yaml"
        path.write_text(dump_yaml({"name": "tiny", "recipe": recipe, **content}))
        return path

    return write


VARIANTS: dict[str, Any] = {"ask": {"method": "zero-shot"}, "lora": {}}
TUNE = {
    "trials": 3,
    "trial": {"training.budget": "8 examples"},
    "space": {"training.learning_rate": [1e-3, 1e-2, 1e-1]},
}


def test_cells_and_trials_are_listed_with_memory_and_time_and_nothing_is_written(
    suite_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = suite_file(variants=VARIANTS, tune=TUNE, seeds=[0, 1])
    assert main(["bench", str(path), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == [path]
    lines = {(line["variant"], line["kind"]): line for line in document["cells"]}
    assert {key: line["count"] for key, line in lines.items()} == {
        ("lora", "trial"): 3,
        ("ask", "cell"): 2,
        ("lora", "cell"): 2,
    }
    trial, cell, ask = lines[("lora", "trial")], lines[("lora", "cell")], lines[("ask", "cell")]
    assert (trial["num_steps"], cell["num_steps"]) == (2, 4)
    assert "needed_bytes" not in ask
    assert cell["seconds"] == pytest.approx(START_SECONDS + cell["train_seconds"] + cell["scoring_seconds"])
    # eight examples a split: trials score validation at step 2 and at the end; cells at 2, 4 and the end, then test
    assert cell["scoring_seconds"] == pytest.approx(2 * trial["scoring_seconds"], rel=0.5)
    total = sum(line["count"] * line["seconds"] for line in document["cells"])
    assert document["seconds"] == pytest.approx(total)


def test_what_does_not_fit_the_named_card_is_told_and_ends_with_3(
    suite_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite_file(variants=VARIANTS)
    assert main(["bench", str(path), "--dry-run", "--gpu", "1MiB"]) == 3
    shown = capsys.readouterr().out
    assert "too large" in shown
    assert "lora does not fit: this run needs" in " ".join(shown.split())
    assert "time unknown" in shown


def test_a_method_that_cannot_work_is_told_and_ends_with_2(suite_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = suite_file(variants={"lost": {"method.targets": ["no_such_layer"]}, "lora": {}})
    assert main(["bench", str(path), "--dry-run"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "lost cannot work" in shown
    assert "no_such_layer" in shown


def test_gpu_without_dry_run_is_refused(suite_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(suite_file()), "--gpu", "12GiB"]) == 2
    assert "--gpu is for --dry-run" in capsys.readouterr().err
