"""Tasks of the lm-evaluation-harness, from a folder of task files, on a real chat model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from peftkit.cli import main
from peftkit.errors import InputError

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "The capital of {{country}} is"
doc_to_target: "{{choices.index(capital)}}"
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Japan": "Tokyo"}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "capitals.yaml").write_text(TASK, encoding="utf-8")
    lines = [{"country": c, "capital": k, "choices": [*CAPITALS.values()]} for c, k in CAPITALS.items()]
    # asked for a word that no model would say: the fifth answer is wrong for sure
    lines.append({"country": "France", "capital": "qzx", "choices": ["Paris", "qzx"]})
    (folder / "capitals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_task_file_scores_a_model_with_its_data_beside_it(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
    arguments = ["eval", "smollm2-135m", "--lm-eval", "capitals", "--lm-eval-tasks", str(tasks), "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["capitals acc"]["value"] == pytest.approx(4 / 5)
    # Wilson's: the middle (p + z^2 / 2n) / (1 + z^2 / n), half of it z / (1 + z^2 / n) sqrt(p q / n + z^2 / 4 n^2)
    p, n, z = 0.8, 5, 1.959964
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["capitals acc"]["high"] == pytest.approx((p + z * z / (2 * n)) / (1 + z * z / n) + half, abs=1e-5)
    assert found["capitals acc"]["n"] == 5
    written = json.loads((tmp_path / "lm_eval.json").read_text(encoding="utf-8"))
    assert written["task_versions"] == {"capitals": "1.0"}
    assert written["metrics"] == found


def test_a_task_that_is_not_there_and_data_that_are_not_there_are_named(
    tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
    from peftkit.deploy.harness import evaluate_tasks

    with pytest.raises(InputError, match=r"no task 'capitols' in .*did you mean 'capitals'"):
        evaluate_tasks("smollm2-135m", ["capitols"], tasks_folder=tasks)
    (tasks / "capitals.jsonl").unlink()
    with pytest.raises(InputError, match="lm-eval cannot read capitals and its data: FileNotFoundError"):
        evaluate_tasks("smollm2-135m", ["capitals"], tasks_folder=tasks)
    with pytest.raises(InputError, match="is not a folder"):
        evaluate_tasks("smollm2-135m", ["capitals"], tasks_folder=tasks / "none")


def test_flags_that_would_be_ignored_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, told in (
        (["--lm-eval-tasks", str(tmp_path)], "--lm-eval-tasks would be ignored"),
        (["--lm-eval-limit", "3"], "--lm-eval-limit would be ignored"),
        (["recipe.yaml", "--lm-eval", "capitals"], "recipe.yaml would be ignored"),
        (["--lm-eval", " , "], "names no task"),
        (["--lm-eval", "capitals", "--lm-eval-limit", "0"], "leaves no example"),
    ):
        assert main(["eval", "smollm2-135m", *flags]) == 2
        assert told in capsys.readouterr().err
