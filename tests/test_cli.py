"""The command line from outside: exit codes, messages, and what wrong input leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftkit.cli import main
from peftkit.recipe import Recipe


@pytest.fixture
def recipe_file(classify_recipe: Any, tmp_path: Path) -> Path:
    recipe: Recipe = classify_recipe("training.max_steps=2")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return path


def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a verb that must end with exit code 2, one message and nothing on standard output; return the message."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    caught = capsys.readouterr()
    assert code == 2
    assert caught.out == ""
    assert "Traceback" not in caught.err
    return caught.err


def write_rows(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


ROW = '{"text": "fine", "label": "good"}'


def test_the_package_runs_as_a_module() -> None:
    told = subprocess.run([sys.executable, "-m", "peftkit", "tarin"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith("peftkit: no verb 'tarin'")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.learning_rat=1", "did you mean 'learning_rate'"),
        ("training.epochs=many", "training.epochs"),
        ("data.train=absent.jsonl", "absent.jsonl"),
        ("backbone.name=minilm-l7", "did you mean 'minilm-l6'"),
        ("backbone.name=/no/such/folder", "/no/such/folder"),
        ("method=lorra", "did you mean 'lora'"),
        ("method.targets=[q_proj]", "Available: dense, key, query, value"),
        ("data.columns.label=mood", "mood"),
        ("evaluation.metric=accurcy", "It has: loss, accuracy"),
    ],
)
def test_a_wrong_setting_is_one_message_and_leaves_nothing(
    override: str, told: str, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert told in refuse(["train", str(recipe_file), override, "--out", str(out)], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ((), "empty"),
        ((ROW, '{"text": "fine", '), ":2"),
        ((ROW, '{"text": "fine"}'), ":2"),
        ((ROW, ROW), "only one label"),
    ],
)
def test_faulty_data_is_named_by_file_and_row(
    lines: tuple[str, ...], told: str, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "broken.jsonl", *lines)
    message = refuse(["train", str(recipe_file), f"data.train={train}", "--out", str(tmp_path / "run")], capsys)
    assert told in message
    assert "broken.jsonl" in message or told == "only one label"


def test_a_label_unseen_in_train_is_named(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = write_rows(tmp_path / "test.jsonl", ROW, '{"text": "so so", "label": "middling"}')
    message = refuse(["train", str(recipe_file), f"data.test={test}", "--out", str(tmp_path / "run")], capsys)
    assert "test.jsonl:2: label 'middling' does not occur in the training split" in message


def test_all_labels_masked_is_refused(chat_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(chat_recipe("training.max_tokens=4").to_yaml())
    assert "all labels are masked" in refuse(["train", str(path), "--out", str(tmp_path / "run")], capsys)


def test_full_finetuning_on_nf4_names_the_remedy(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["method=full", "backbone.quantization=nf4"]
    assert "method=qlora" in refuse(["train", str(recipe_file), *overrides, "--out", str(tmp_path / "run")], capsys)


def test_a_folder_with_another_run_is_kept(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", str(recipe_file), "--out", str(out)]) == 0
    before = (out / "record.json").read_text()
    capsys.readouterr()
    message = refuse(["train", str(recipe_file), "seed=1", "--out", str(out)], capsys)
    assert "already holds another run" in message
    assert "seed: 0 -> 1" in message
    message = refuse(["train", str(recipe_file), "method.rank=4", "--out", str(out), "--resume"], capsys)
    assert "method.rank: 16 -> 4" in message
    assert (out / "record.json").read_text() == before


def test_a_finished_run_is_shown_again_and_not_repeated(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", str(recipe_file), "--out", str(out)]) == 0
    first = capsys.readouterr().out
    stamp = (out / "record.json").stat().st_mtime_ns
    assert main(["train", str(recipe_file), "--out", str(out)]) == 0
    assert capsys.readouterr().out == first
    assert (out / "record.json").stat().st_mtime_ns == stamp


def test_a_file_in_the_way_and_a_full_folder_are_refused(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert "is a file" in refuse(["train", str(recipe_file), "--out", str(taken)], capsys)
    assert taken.read_text() == "mine"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert "not empty" in refuse(["train", str(recipe_file), "--out", str(folder)], capsys)
    assert "cannot write" in refuse(["train", str(recipe_file), "--out", "/proc/run"], capsys)


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'train'" in refuse(["trian"], capsys)


def test_a_missing_recipe_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read" in refuse(["train", str(tmp_path / "none.yaml")], capsys)
    assert "cannot read" in refuse(["bench", str(tmp_path / "none.yaml")], capsys)
    assert "neither a finished run" in refuse(["merge", str(tmp_path), "--out", str(tmp_path / "m")], capsys)


def test_json_is_one_document_and_nothing_else(
    proving_here: None, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["train", str(recipe_file), "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"
    assert main(["eval", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["n"] == 8
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["metrics"]["accuracy"]["n"] == 8
    assert main(["data", str(recipe_file), "--json", "-n", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["recipes", "list", "--json"]) == 0
    assert {"name", "description"} == set(json.loads(capsys.readouterr().out)[0])
    assert main(["merge", out, "--out", str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"
    assert main(["report", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_eval_of_run_and_merged_model_agree(
    proving_here: None, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    assert main(["train", str(recipe_file), "--out", run]) == 0
    assert main(["merge", run, "--out", merged]) == 0
    capsys.readouterr()
    found = []
    for reference in (run, merged):
        assert main(["eval", reference, str(recipe_file), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["accuracy"]["value"] == found[1]["accuracy"]["value"]


def test_a_chat_run_generates_before_and_after_merging(
    proving_here: None, chat_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(chat_recipe("training.max_steps=2", "training.learning_rate=1e-2").to_yaml())
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    assert main(["train", str(path), "--out", run]) == 0
    assert main(["merge", run, "--out", merged]) == 0
    capsys.readouterr()
    answers = []
    for reference in (run, merged):
        assert main(["generate", reference, "Hi", "--max-new-tokens", "5"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = "import sys\nfrom peftkit.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "print(sorted({'torch', 'transformers', 'pydantic', 'numpy', 'rich'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stderr.strip() == "[]"


@pytest.mark.slow
def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(classify_recipe: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "recipe.yaml"
    recipe = classify_recipe("training.batch_size=1", "training.epochs=30", "training.checkpoint_every=20")
    path.write_text(recipe.to_yaml())

    def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "peftkit.cli", "train", str(path), "--out", str(out), *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    broken = tmp_path / "broken"
    victim = start(broken)
    while victim.poll() is None and not list((broken / "checkpoints").glob("step-*")):
        pass
    victim.kill()
    assert victim.wait() == -9
    assert not (broken / "record.json").exists()
    assert start(broken, "--resume").wait() == 0
    one = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    other = load_file(broken / "adapter" / "adapter_model.safetensors")
    assert all(bool((one[name] == other[name]).all()) for name in one)
