"""The loop: what an optimizer step is, what a checkpoint is, and what stops a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from peftkit.data.batching import micro_batches
from peftkit.errors import Diverged, GuardTripped, InputError
from peftkit.prepare import prepare
from peftkit.recipe import Recipe, Training
from peftkit.run import evaluate, train
from peftkit.train.fastpath import FastPath
from peftkit.train.guards import MovementGuard
from peftkit.train.loop import Loop
from peftkit.train.optimizers import learning_rate
from peftkit.train.progress import PlainObserver

STEADY = ("training.warmup=0", "training.schedule=constant", "training.learning_rate=1e-2")


def run_loop(recipe: Recipe, folder: Path, *, double: bool = False) -> Loop:
    ready = prepare(recipe, PlainObserver(), device=torch.device("cpu"))
    if double:
        ready.adapted.model.double()
    backbone = ready.backbone
    features = ready.task.encode(
        ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128
    ).features
    loop = Loop(
        ready.adapted,
        ready.task,
        recipe.training,
        recipe.evaluation,
        train=features,
        validation=features,
        fast=FastPath.open(
            ready.adapted.model,
            recipe.training.kernels,
            attention="auto",
            pad_id=backbone.tokenizer.pad_token_id,
            say=PlainObserver().say,
        ),
        seed=recipe.seed,
        folder=folder,
        accelerator=Accelerator(),
        observer=PlainObserver(),
    )
    loop.fit()
    return loop


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loop.trainable.items()}


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "full"])
@pytest.mark.parametrize("cut", ["1", "2", "4", "60 tokens", "auto"])
def test_a_step_is_the_same_however_it_is_cut(cut: str, method: str, chat_recipe: Any, tmp_path: Path) -> None:
    # Eight conversations of unequal lengths, one optimizer step of all, in float64 so that only the cut could differ.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    common = ("training.batch_size=8", "training.max_steps=2", "evaluation.every=never", *STEADY)
    one = run_loop(chat_recipe("training.micro_batch=8", *common, method=method), whole, double=True)
    other = run_loop(chat_recipe(f"training.micro_batch={cut}", *common, method=method), parts, double=True)
    assert one.state.first_loss == pytest.approx(other.state.first_loss, rel=1e-6)  # summed in float32
    for name, tensor in weights(one).items():
        # AdamW divides by the gradient's own size, so a gradient near zero may show its rounding.
        torch.testing.assert_close(tensor, weights(other)[name], rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_labelled_tokens(chat_recipe: Any, tmp_path: Path) -> None:
    recipe = chat_recipe("training.max_steps=1", "training.micro_batch=3", "evaluation.every=never", *STEADY)
    ready = prepare(recipe, PlainObserver(), device=torch.device("cpu"))
    backbone = ready.backbone
    features = ready.task.encode(
        ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128
    ).features
    total = count = 0.0
    for feature in features:  # one at a time, by transformers' own loss over all positions
        ids = torch.tensor(feature.input_ids[None].astype("int64"))
        labels = torch.tensor(feature.target[None].astype("int64"))
        with torch.no_grad():
            mean = backbone.model(input_ids=ids, labels=labels).loss
        total += float(mean) * feature.loss_units
        count += feature.loss_units
    assert run_loop(recipe, tmp_path).state.first_loss == pytest.approx(total / count, rel=1e-5)


def test_micro_batches_keep_every_example_and_the_budget(chat_recipe: Any) -> None:
    recipe = chat_recipe()
    ready = prepare(recipe, PlainObserver(), device=torch.device("cpu"))
    backbone = ready.backbone
    features = ready.task.encode(
        ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128
    ).features
    groups = list(micro_batches(features, max_tokens=120))
    assert sorted(f.row for group in groups for f in group) == list(range(8))
    assert all(len(group) == 1 or len(group) * max(map(len, group)) <= 120 for group in groups)
    assert [len(group) for group in micro_batches(features, max_examples=3)] <= [3] * 8


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", ()),
        ("prompt", ()),
        ("full", ()),
        ("full", ("training.optimizer_in_backward=true", "training.clip=null")),
        ("full", ("training.optimizer=adamw-8bit",)),
        ("full", ("method.weights=stochastic", "backbone.dtype=bfloat16")),
        ("full", ("method.weights=kahan", "backbone.dtype=bfloat16")),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(
    method: str, settings: tuple[str, ...], classify_recipe: Any, tmp_path: Path
) -> None:
    overrides = ("training.batch_size=2", "training.epochs=3", "training.checkpoint_every=5", *STEADY, *settings)
    recipe = classify_recipe(*overrides, method=method)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(recipe, straight)

    class Cut(PlainObserver):
        def on_step(self, report: Any) -> None:
            if report.step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, broken, observer=Cut())
    record = train(recipe, broken, resume=True)
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    one, other = load_file(straight / name), load_file(broken / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert record.throughput is not None
    assert record.throughput.samples == 24  # three epochs of eight, none lost and none twice
    steps = [json.loads(line)["step"] for line in (broken / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("settings", [("method.weights=kahan",), ()])
def test_a_bfloat16_run_is_scored_again_as_it_was(
    settings: tuple[str, ...], classify_recipe: Any, tmp_path: Path
) -> None:
    recipe = classify_recipe("training.max_steps=2", "backbone.dtype=bfloat16", *STEADY, *settings, method="full")
    record = train(recipe, tmp_path / "run")
    assert evaluate(tmp_path / "run")["accuracy"].value == record.metrics["accuracy"].value


def test_a_loss_that_is_no_number_stops_the_run(classify_recipe: Any, tmp_path: Path) -> None:
    recipe = classify_recipe("training.learning_rate=1e30", "training.clip=null", "training.epochs=20", method="full")
    with pytest.raises(Diverged, match=r"training\.learning_rate"):
        train(recipe, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "diverged"


def test_weights_that_do_not_move_stop_the_run(classify_recipe: Any, tmp_path: Path) -> None:
    recipe = classify_recipe("training.learning_rate=1e-60", "training.epochs=3", method="full")
    with pytest.raises(GuardTripped, match="no trained tensor moved"):
        train(recipe, tmp_path / "run")


def test_tensors_without_a_gradient_are_named() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    guard = MovementGuard({"used": used, "unused": unused})
    guard.see_gradients({"used"})
    with torch.no_grad():
        used -= 0.1
    assert guard.judge() == {"tensors": 2, "without_gradient": ["unused"], "unmoved": ["unused"]}


def test_the_best_weights_are_kept(classify_recipe: Any, tmp_path: Path) -> None:
    # A rate far too large makes later epochs worse than the best one, whichever that is.
    overrides = ("training.epochs=6", "training.batch_size=4", "training.learning_rate=0.3", "evaluation.metric=loss")
    record = train(classify_recipe(*overrides), tmp_path / "run")
    best = min(record.history, key=lambda row: row["loss"])
    assert record.guards["best_step"] == best["step"]
    assert record.loss is not None
    assert record.loss.validation == pytest.approx(best["loss"], rel=1e-5)


def test_patience_ends_a_run_that_gets_no_better(classify_recipe: Any, tmp_path: Path) -> None:
    overrides = ("training.epochs=40", "training.learning_rate=0.5", "evaluation.metric=loss", "evaluation.patience=2")
    record = train(classify_recipe(*overrides), tmp_path / "run")
    assert record.guards["stopped_early"]
    assert record.guards["steps"] < 40
    assert record.history[-1]["step"] - record.guards["best_step"] == 2  # one step an epoch, one scoring each


def test_an_unknown_selection_metric_is_refused_with_those_there_are(classify_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="accuracy"):
        train(classify_recipe("evaluation.metric=accurcy"), tmp_path / "run")


def test_a_paged_optimizer_is_refused_without_cuda(classify_recipe: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match=r"training\.optimizer=adamw"):
        train(classify_recipe("training.optimizer=paged-adamw"), tmp_path / "run")


def test_checkpointing_of_activations_changes_no_gradient(chat_recipe: Any, tmp_path: Path) -> None:
    found = []
    for setting in ("off", "all", "1"):
        folder = tmp_path / setting
        folder.mkdir()
        common = ("training.max_steps=2", "evaluation.every=never", f"training.checkpointing={setting}", *STEADY)
        found.append(weights(run_loop(chat_recipe(*common), folder)))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(tensor, other[name])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_warms_up_from_above_zero_and_ends_as_the_schedule_says(schedule: str) -> None:
    training = Training.model_validate({"schedule": schedule, "warmup": 0.1, "learning_rate": 1.0})
    rates = [learning_rate(training, step, 100) for step in range(100)]
    assert 0 < rates[0] < rates[9] < 1.0
    assert rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx({"cosine": 0.0003, "linear": 0.0111, "constant": 1.0}[schedule], abs=1e-4)
