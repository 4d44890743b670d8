"""`peftkit plan` from outside, and what `train` does with a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftkit.cli import main
from peftkit.plan import gate
from peftkit.plan.answer import plan_recipe
from peftkit.plan.cards import Card
from peftkit.record import read_record
from peftkit.units import GIB, MIB, format_seconds


@pytest.fixture
def recipe_file(classify_recipe: Any, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(classify_recipe("training.max_steps=2").to_yaml())
    return path


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *arguments, "--json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, document


def test_the_terms_add_up_and_a_card_with_room_fits(recipe_file: Path, capsys: Any) -> None:
    code, plan = answered(capsys, str(recipe_file), "--gpu", "12GiB")
    assert code == 0
    assert plan["fits"] is True
    assert sum(plan["terms"].values()) == plan["total_bytes"] == plan["reserved_bytes"] + plan["context_bytes"]
    assert plan["needed_bytes"] == round(plan["total_bytes"] * (1 + plan["margin"]))
    assert plan["lengths"]["source"] == "data"


def test_a_card_without_room_is_exit_code_3(recipe_file: Path, capsys: Any) -> None:
    code, plan = answered(capsys, str(recipe_file), "--gpu", "100MiB")
    assert (code, plan["fits"]) == (3, False)


def test_a_named_card_gives_the_time_and_a_size_does_not(recipe_file: Path, capsys: Any) -> None:
    _, named = answered(capsys, str(recipe_file), "--gpu", "RTX 4090")
    assert named["seconds"] == pytest.approx(2 * named["step_seconds"])
    _, sized = answered(capsys, str(recipe_file), "--gpu", "24GiB")
    assert "seconds" not in sized


def test_data_that_are_not_there_leave_the_recipes_maximum(recipe_file: Path, capsys: Any) -> None:
    _, plan = answered(capsys, str(recipe_file), "--gpu", "12GiB", "data.train=absent.jsonl", "training.max_tokens=40")
    assert plan["lengths"] == {"source": "recipe", "longest": 40}


def test_a_packaged_backbone_is_planned_without_being_fetched(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("backbone: smollm2-135m\nmethod: prompt\ndata: {train: absent.jsonl}\ntraining: {max_tokens: 16}\n")
    monkeypatch.setenv("PEFTKIT_HOME", str(tmp_path / "empty"))
    code, plan = answered(capsys, str(path), "--gpu", "8GiB")
    assert (code, plan["parameters"]["total"]) == (0, 134_515_008)
    assert not (tmp_path / "empty" / "backbones").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--gpu", "RTX 9999"), "no card is known as 'RTX 9999'"),
        (("backbone.name=nobody/nothing",), "Check the name and the network"),
        (("method=zero-shot",), "trains nothing"),
        (("training.max_tokens=null",), "training.max_tokens"),
        (("--compare", "--plot", "x.png"), "--plot draws one plan"),
        (("--as", "peer", "--gpu", "12GiB"), "the task must be chat or completion"),
    ],
)
def test_wrong_input_is_one_message(
    arguments: tuple[str, ...], told: str, recipe_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [argument for argument in arguments if "=" in argument]
    flags = [argument for argument in arguments if "=" not in argument]
    assert main(["plan", str(recipe_file), *overrides, *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_an_unknown_architecture_is_one_message(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "quark", "hidden_size": 8}')
    assert main(["plan", str(recipe_file), f"backbone.name={folder}", "--gpu", "12GiB"]) == 2
    told = capsys.readouterr().err
    assert "quark" in told
    assert "Traceback" not in told


def test_a_plain_trainer_needs_more_than_peftkit(chat_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(chat_recipe("training.batch_size=8", "evaluation.every=never").to_yaml())
    _, own = answered(capsys, str(path), "--gpu", "RTX 3060")
    code, peer = answered(capsys, str(path), "--gpu", "RTX 3060", "--as", "peer")
    assert (code, peer["as"]) == (0, "peer")
    assert peer["parameters"] == own["parameters"]
    # every position of every example has float32 logits and a gradient of them, padding included
    logits = 8 * own["lengths"]["longest"] * 49152 * 4
    assert peer["terms"]["logits and loss"] > 2 * logits > own["terms"].get("logits and loss", 0)
    assert main(["plan", str(path), "--as", "peer"]) == 2
    assert "name it, as in --gpu" in capsys.readouterr().err


def test_the_picture_is_a_png(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["plan", str(recipe_file), "--gpu", "8GiB", "--plot", str(tmp_path / "step.png")]) == 0
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_cannot_fit_stops_before_it_loads_a_weight(
    recipe_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(gate, "this_machine", lambda: Card("a thimble", 10 * MIB, kind="cpu"))
    assert main(["train", str(recipe_file), "--out", str(tmp_path / "run")]) == 3
    said = capsys.readouterr().err
    assert "a thimble has 10.0 MiB" in said
    assert "loading" not in said
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_plan_is_not_stopped(recipe_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gate, "this_machine", lambda: Card("a thimble", 10 * MIB, kind="cpu"))
    assert main(["train", str(recipe_file), "--out", str(tmp_path / "run"), "--no-plan"]) == 0
    memory = read_record(tmp_path / "run").memory
    assert memory is not None
    assert memory.predicted_tensor_peak_bytes is None


@pytest.mark.parametrize("method", ["lora", "full", "prefix", "head"])
def test_the_record_keeps_prediction_and_measurement_and_they_agree(
    method: str, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert main(["train", str(recipe_file), f"method={method}", "training.max_steps=3", "--out", str(out)]) == 0
    memory = read_record(out).memory
    assert memory is not None
    assert memory.tensor_peak_bytes is not None
    # on a tiny model, tensors of a few bytes that the simulation leaves out weigh more than on a real one
    assert memory.predicted_tensor_peak_bytes == pytest.approx(memory.tensor_peak_bytes, rel=0.02)


def test_a_real_step_far_from_its_prediction_is_told() -> None:
    assert gate.deviation(10 * GIB, int(10.9 * GIB)) is None
    told = gate.deviation(10 * GIB, 12 * GIB)
    assert told is not None
    assert "12.0 GiB" in told
    assert "+20%" in told


def test_a_few_real_steps_correct_the_planned_time(classify_recipe: Any) -> None:
    plan = plan_recipe(classify_recipe("training.epochs=100"))
    plan = replace(plan, step_seconds=1.0)
    told: list[str] = []
    watch = gate.StepWatch(plan, on_host=True, say=told.append)
    assert plan.num_steps == 100 * 8 // plan.recipe.training.batch_size
    for step in range(plan.num_steps):
        # twice the planned second for the tokens of a mean step; whatever watched steps take is left out
        seconds = 99.0 if step in (0, plan.workload.heaviest_step) else 2.0
        tokens = round(1000 * plan.workload.step_tokens)
        watch.judge(step, tensor_bytes=plan.simulation.first_step_bytes, seconds=1000 * seconds, tokens=tokens)
    (line,) = told
    done = 1 + gate.CALIBRATING + (plan.workload.heaviest_step in range(1, 2 + gate.CALIBRATING))
    assert line == (
        f"a step takes 2.0s here, where the plan said 1.0s: about {format_seconds(2.0 * (plan.num_steps - done))} "
        "of training left"
    )
