"""The search against a card whose needs follow a simple law, so that the best answer is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from peftkit.backbones.load import dims_of
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec
from peftkit.plan.cards import Card
from peftkit.plan.estimate import Rates
from peftkit.plan.planner import Plan, Planner
from peftkit.plan.search import find_fit
from peftkit.plan.simulation import Simulation
from peftkit.plan.sizes import fully_labelled
from peftkit.plan.workload import Workload, heaviest_forwards
from peftkit.recipe import Recipe, build_recipe

WEIGHTS, MOMENTS, TOKEN, LAYERS = 30_000, 12_000, 30, 30
"""Bytes of weights (a quarter in NF4), of Adam's moments (a quarter in 8 bits) and of a token's activations, of which
a recomputed layer keeps nothing; each recomputed layer costs a hundredth of the time, each forward next to none."""


@dataclass
class LawfulPlanner:
    """Stands in for `Planner`: needs by the law above, and counts how often it was asked."""

    memory_bytes: int
    asked: list[Recipe] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.card = Card("lawful", self.memory_bytes)
        self.dims = dims_of(BackboneSpec(name="smollm2-135m"), LANGUAGE_HEAD)
        self.rates = Rates(1.0, 1.0)

    def plan(self, recipe: Recipe, workload: Workload) -> Plan:
        self.asked.append(recipe)
        training = recipe.training
        layers = {"auto": 0, "off": 0, "all": LAYERS}.get(str(training.checkpointing))
        recomputed = int(training.checkpointing) if layers is None else layers
        lengths = [size.tokens for size in heaviest_forwards(recipe, workload.longest, device="cuda")]
        forward = int(str(training.micro_batch).split()[0]) if " " in str(training.micro_batch) else sum(lengths)
        weights = WEIGHTS // (4 if recipe.backbone.quantization == "nf4" else 1)
        moments = MOMENTS // (4 if "8bit" in training.optimizer else 1)
        activations = (
            min(forward, sum(size.tokens for size in workload.longest)) * TOKEN * (LAYERS - recomputed) // LAYERS
        )
        terms = {"weights": weights, "optimizer state": moments, "activations": activations}
        total = sum(terms.values())
        forwards = -(-sum(lengths) // forward)
        work = [("forward", sum(lengths) * (100 + recomputed) + forwards, 0)]
        found = Simulation(
            total, total, 0, "forward", terms, {}, total, total, terms, timeline=[], work=work, flops={}, moved_bytes={}
        )
        return Plan(recipe, self.card, workload, found, 1, 1, 0.0, None, None)


def recipe_with(**training: Any) -> Recipe:
    return build_recipe(
        {
            "backbone": {"name": "smollm2-135m"},
            "method": {"kind": "lora"},
            "data": {"train": "x.jsonl"},
            "training": {"batch_size": 8, "max_tokens": 1000, "micro_batch": "8000 tokens", **training},
        }
    )


def search(memory_bytes: int, recipe: Recipe | None = None, **options: Any) -> tuple[Any, LawfulPlanner]:
    planner = LawfulPlanner(memory_bytes)
    workload = Workload(fully_labelled((1000,) * 8), None, (), 8000.0, None, "recipe")
    return find_fit(recipe or recipe_with(), cast(Planner, planner), workload, **options), planner


def test_a_recipe_that_fits_and_recomputes_nothing_is_left_as_it_is() -> None:
    found, _ = search(WEIGHTS + MOMENTS + 8000 * TOKEN)
    assert found.chosen is found.options[0]
    assert found.chosen.changes == ()


def test_recomputation_is_dropped_where_it_is_not_needed() -> None:
    found, _ = search(10**9, recipe_with(checkpointing="all"))
    assert "training.checkpointing=off" in found.chosen.changes
    assert found.chosen.time_ratio == pytest.approx(100 / 130, rel=1e-4)


def test_forwards_shrink_before_layers_recompute() -> None:
    # room for the activations of 3,500 tokens: forwards of three examples of a thousand
    found, _ = search(WEIGHTS + MOMENTS + 3500 * TOKEN)
    assert found.chosen.changes == ("training.micro_batch=3000 tokens", "training.checkpointing=off")
    assert found.chosen.gives_up == "nothing"


def test_as_few_layers_recompute_as_are_needed() -> None:
    # one example's activations but for a third of them: 10 of 30 layers
    found, _ = search(WEIGHTS + MOMENTS + 1000 * TOKEN * 2 // 3)
    assert found.chosen.changes == ("training.micro_batch=1000 tokens", "training.checkpointing=10")
    assert found.chosen.time_ratio == pytest.approx(1.1, rel=1e-4)


def test_the_optimizer_is_given_up_before_the_weights_and_these_before_length() -> None:
    # recomputing all, what is left is weights and moments
    smaller_moments, _ = search(WEIGHTS + MOMENTS // 4 + 1)
    assert smaller_moments.chosen.gives_up == "Adam's moments in 8 bits"
    smaller_weights, _ = search(WEIGHTS // 4 + MOMENTS // 4 + 1)
    assert smaller_weights.chosen.gives_up == "Adam's moments in 8 bits, weights in NF4"
    assert {"training.optimizer=adamw-8bit", "backbone.quantization=nf4"} < set(smaller_weights.chosen.changes)


def test_shorter_examples_are_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten layers' worth that cannot be recomputed the length has to halve."""
    planner = LawfulPlanner(WEIGHTS // 4 + MOMENTS // 4 + 500 * TOKEN)
    original = planner.plan

    def stubborn(recipe: Recipe, workload: Workload) -> Plan:
        off = build_recipe(recipe.to_dict(), ["training.checkpointing=off"])
        return original(off, workload)

    monkeypatch.setattr(planner, "plan", stubborn)
    workload = Workload(fully_labelled((1000,) * 8), None, (), 8000.0, None, "recipe")
    found = find_fit(recipe_with(), cast(Planner, planner), workload)
    assert found.chosen is not None
    assert "training.max_tokens=500" in found.chosen.changes
    assert found.chosen.gives_up.endswith("text beyond 500 tokens")


def test_nothing_is_chosen_where_nothing_fits() -> None:
    found, _ = search(100)
    assert found.chosen is None
    assert all(not option.plan.fits for option in found.options)


def test_only_the_cut_may_change_when_it_is_said_so() -> None:
    found, planner = search(WEIGHTS // 4, only_cuts=True)
    assert found.chosen is None
    assert {recipe.backbone.quantization for recipe in planner.asked} == {"none"}


def test_the_optimizer_step_keeps_its_examples() -> None:
    _, planner = search(WEIGHTS // 4 + MOMENTS // 4 + 1)
    assert {recipe.training.batch_size for recipe in planner.asked} == {8}
