"""Where a run ends: epochs, steps, and budgets of examples, tokens and seconds."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftkit.data.batching import step_order
from peftkit.errors import RecipeError
from peftkit.plan.sizes import fully_labelled
from peftkit.plan.workload import workload_of
from peftkit.recipe import Training
from peftkit.run import train
from peftkit.train import meter
from peftkit.train.course import FIRST_GUESS, Course
from peftkit.train.optimizers import learning_rate
from peftkit.train.progress import PlainObserver

LENGTHS = [5, 6, 7, 8, 9, 10, 11]


def course(**training: Any) -> Course:
    return Course(Training.model_validate({"batch_size": 4, **training}), LENGTHS, seed=0)


def in_order(count: int) -> list[int]:
    """Positions of the examples of the first epochs, end to end."""
    epochs = (step_order(len(LENGTHS), 4, seed=0, epoch=epoch) for epoch in range(count))
    return [int(position) for steps in epochs for step in steps for position in step]


def seen(run: Course) -> list[int]:
    return [int(position) for step in range(run.total_steps or 0) for position in run.examples(step)]


def test_without_a_budget_a_run_has_its_epochs_or_its_steps() -> None:
    assert (course(epochs=2).total_steps, seen(course(epochs=2))) == (4, in_order(2))
    assert course(epochs=2, max_steps=3).total_steps == 3
    assert course(epochs=2).horizon(1, 0.0) == 4


@pytest.mark.parametrize("amount", [1, 4, 7, 10, 15])
def test_a_budget_of_examples_is_met_to_the_example(amount: int) -> None:
    assert seen(course(budget=f"{amount} examples")) == in_order(3)[:amount]


@pytest.mark.parametrize("amount", [1, 30, 56, 100])
def test_a_budget_of_tokens_ends_with_the_example_that_reaches_it(amount: int) -> None:
    found = seen(course(budget=f"{amount} tokens"))
    assert found == in_order(3)[: len(found)]
    spent = [LENGTHS[position] for position in found]
    assert sum(spent[:-1]) < amount <= sum(spent)


def test_the_schedule_follows_the_share_of_the_budget_that_is_spent() -> None:
    run = course(budget="100 tokens")
    spent = [0, *itertools.accumulate(sum(LENGTHS[p] for p in run.examples(step)) for step in range(10))]
    assert [step / run.horizon(step, 0.0) for step in range(1, 4)] == pytest.approx([n / 100 for n in spent[1:4]])
    training = Training.model_validate({"budget": "100 tokens", "schedule": "linear", "warmup": 0, "learning_rate": 1})
    assert learning_rate(training, 3, run.horizon(3, 0.0)) == pytest.approx(1 - spent[3] / 100)


def test_by_the_clock_a_run_ends_with_the_step_that_reaches_it_and_its_length_is_guessed_from_its_pace() -> None:
    run = course(budget="30 seconds")
    assert (run.total_steps, run.horizon(0, 0.0)) == (None, FIRST_GUESS)
    assert run.horizon(2, 6.0) == 10  # three seconds a step
    assert [run.is_over(9, seconds) for seconds in (29.9, 30.0)] == [False, True]
    assert [run.expected_steps(2, 6.0), run.expected_steps(11, 31.0)] == [10, 11]
    assert run.seconds_left(2, 6.0, step_seconds=99.0) == 24.0


def test_a_plan_counts_the_steps_of_a_budget(classify_recipe: Any) -> None:
    sizes = fully_labelled(LENGTHS)
    for budget in ("10 examples", "30 tokens", "100 tokens"):
        recipe = classify_recipe("training.batch_size=4", f"training.budget={budget}")
        found = workload_of(recipe, sizes)
        assert found.num_steps(recipe) == course(budget=budget).total_steps
    timed = classify_recipe("training.budget=30 seconds")
    assert workload_of(timed, sizes).num_steps(timed) is None


def test_a_budget_beside_max_steps_and_hurdles_without_validation_are_refused(classify_recipe: Any) -> None:
    with pytest.raises(RecipeError, match="both say where training ends"):
        classify_recipe("training.max_steps=3", "training.budget=10 examples")
    with pytest.raises(RecipeError, match=r"training\.budget"):
        classify_recipe("training.budget=10 minutes")
    with pytest.raises(RecipeError, match=r"evaluation\.hurdles would be ignored"):
        classify_recipe("data.validation=null", "evaluation.hurdles={2: 0.5}")


class Cut(PlainObserver):
    """Interrupts a run after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step(self, report: Any) -> None:
        if report.step == self.step:
            raise KeyboardInterrupt


def test_a_run_spends_its_budget_once_however_often_it_is_resumed(classify_recipe: Any, tmp_path: Path) -> None:
    recipe = classify_recipe("training.batch_size=2", "training.budget=13 examples", "training.checkpoint_every=2")
    straight = train(recipe, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "broken", observer=Cut(5))
    broken = train(recipe, tmp_path / "broken", resume=True)
    assert straight.throughput is not None
    assert broken.throughput is not None
    assert (straight.throughput.samples, broken.throughput.samples) == (13, 13)
    assert straight.guards["steps"] == 7
    one, other = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("straight", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_budget_of_seconds_counts_training_steps_alone(
    classify_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)), process_time=lambda: 0.0)
    monkeypatch.setattr(meter, "time", clock)  # a step takes one second: it looks twice
    recipe = classify_recipe("training.budget=5 seconds", "training.batch_size=4", "evaluation.every=2")
    record = train(recipe, tmp_path / "run")
    assert record.guards["steps"] == 5
    assert [row["step"] for row in record.history] == [2, 4, 5]
    assert record.throughput is not None
    assert record.throughput.train_seconds == 5.0


@pytest.mark.parametrize(("hurdle", "ended_at"), [(1.1, 2), (0.0, 4)])  # accuracies are between these
def test_a_run_that_misses_a_hurdle_stops_there(
    hurdle: float, ended_at: int, classify_recipe: Any, tmp_path: Path
) -> None:
    recipe = classify_recipe("training.max_steps=4", "evaluation.every=1", f"evaluation.hurdles={{2: {hurdle}}}")
    record = train(recipe, tmp_path / "run")
    assert (record.status, record.guards["steps"], record.guards["metric"]) == ("ok", ended_at, "accuracy")
    assert record.guards.get("missed_hurdle") == (2 if ended_at == 2 else None)


def test_a_hurdle_for_a_loss_is_an_upper_one(chat_recipe: Any, tmp_path: Path) -> None:
    steps = ("training.max_steps=3", "evaluation.every=1")
    missed = train(chat_recipe(*steps, "evaluation.hurdles={1: 0.01}"), tmp_path / "missed")
    passed = train(chat_recipe(*steps, "evaluation.hurdles={1: 100.0}"), tmp_path / "passed")
    assert (missed.guards["steps"], passed.guards["steps"]) == (1, 3)
