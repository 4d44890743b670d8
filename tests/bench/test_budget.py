"""Budgets of a suite: the same examples, tokens, seconds or memory for every cell that trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftkit.bench.memory import held_to_memory, largest, own_bytes
from peftkit.bench.suite import Suite, build_suite
from peftkit.errors import DoesNotFit, RecipeError
from peftkit.plan.answer import open_planner
from peftkit.recipe import Recipe, build_recipe


@pytest.fixture
def suite(tiny_bert: Path, reviews_file: Path) -> Any:
    """Builds a suite of a prompting baseline and two methods on the tiny encoder, eight examples a step."""

    def build(**content: Any) -> Suite:
        recipe = {
            "backbone": {"name": str(tiny_bert), "dtype": "float32"},
            "method": "lora",
            "task": "classify",
            "data": {"train": str(reviews_file)},
            "training": {"batch_size": 8},
        }
        variants = {"ask": {"method": "zero-shot"}, "full": {"method": "full"}, "lora": {}}
        return build_suite({"name": "s", "recipe": recipe, "variants": variants, **content})

    return build


@pytest.mark.parametrize(("key", "amount"), [("examples", 100), ("tokens", 5000), ("seconds", 60)])
def test_a_counted_budget_reaches_every_cell_that_trains_and_no_other(key: str, amount: int, suite: Any) -> None:
    cells = suite(budget={key: amount}).cells()
    assert [cell.recipe.training.budget for cell in cells] == [None, f"{amount} {key}", f"{amount} {key}"]


@pytest.mark.parametrize("budget", [{}, {"examples": 10, "tokens": 10}, {"memory": "much"}, {"examples": 0}])
def test_a_budget_is_of_one_thing(budget: dict[str, Any], suite: Any) -> None:
    with pytest.raises(RecipeError, match="budget"):
        suite(budget=budget)


def test_the_largest_that_fits_is_found() -> None:
    for most in (1, 2, 7, 64):
        for limit in range(most + 1):
            assert largest(lambda count, limit=limit: count <= limit, most) == limit


def needed(recipe: Recipe, count: int) -> int:
    recipe = build_recipe(recipe.to_dict(), [f"training.micro_batch={count}"])
    planner, hand = open_planner(recipe, None)
    return own_bytes(planner.plan(recipe, hand.workload(recipe, planner.dims)))


def test_a_budget_of_memory_gives_each_method_the_largest_forward_that_plans_to_fit(suite: Any) -> None:
    lora = suite().cells()[2].recipe
    room = needed(lora, 4)
    assert needed(lora, 5) > room
    own = suite(budget={"memory": f"{room / 2**20}MiB"}, exclude=[{"variant": "full"}])
    ask, found = held_to_memory(own, own.cells())
    assert ask.recipe.training.micro_batch == "auto"
    assert found.recipe.training.micro_batch == 4
    assert found.recipe.training.batch_size == 8
    assert found.name.endswith(found.recipe.digest[:8])


def test_what_does_not_fit_with_one_example_is_named(suite: Any) -> None:
    lora, full = suite().cells()[2].recipe, suite().cells()[1].recipe
    room = needed(lora, 1)
    assert needed(full, 1) > room  # it holds gradients and moments of every weight
    own = suite(budget={"memory": f"{room / 2**20}MiB"})
    with pytest.raises(DoesNotFit, match="full: needs") as caught:
        held_to_memory(own, own.cells())
    assert "lora" not in str(caught.value)


def test_what_this_process_holds_besides_is_no_part_of_the_budget(suite: Any) -> None:
    recipe = suite().cells()[2].recipe
    planner, hand = open_planner(recipe, None)
    plan = planner.plan(recipe, hand.workload(recipe, planner.dims))
    grown = replace(
        plan.simulation,
        context_bytes=plan.simulation.context_bytes + 10**9,
        terms=plan.simulation.terms | {"context": plan.simulation.terms["context"] + 10**9},
    )
    assert own_bytes(replace(plan, simulation=grown)) == pytest.approx(own_bytes(plan), abs=1)
