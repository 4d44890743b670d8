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
def suite(tiny_llama: Path, talks_file: Path) -> Any:
    """Builds a suite of a prompting baseline and two methods, four examples a step, with logits in full."""

    def build(**content: Any) -> Suite:
        recipe = {
            "backbone": {"name": str(tiny_llama), "dtype": "float32"},
            "method": "lora",
            "task": "chat",
            "data": {"train": str(talks_file)},
            "training": {"batch_size": 4, "kernels": {"loss": False}},
            "evaluation": {"batch_tokens": 1},  # scoring has its own forwards, and is planned too
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


def needed(recipe: Recipe, *counts: int) -> list[int]:
    """Bytes of plans with so many examples a forward."""
    planner, hand = open_planner(recipe, None)
    workload = hand.workload(recipe, planner.dims)
    cut = [build_recipe(recipe.to_dict(), [f"training.micro_batch={count}"]) for count in counts]
    return [own_bytes(planner.plan(each, workload)) for each in cut]


def test_a_budget_of_memory_gives_each_method_the_largest_forward_that_plans_to_fit(suite: Any) -> None:
    counts = range(1, 5)
    found = needed(suite().cells()[2].recipe, *counts)
    room = (found[0] + found[-1]) // 2
    expected = max(count for count, num_bytes in zip(counts, found, strict=True) if num_bytes <= room)
    assert found[0] < found[-1]
    own = suite(budget={"memory": f"{room / 2**20}MiB"}, exclude=[{"variant": "full"}])
    ask, held = held_to_memory(own, own.cells())
    assert ask.recipe.training.micro_batch == "auto"
    assert held.recipe.training.micro_batch == expected
    assert held.recipe.training.batch_size == 4
    assert held.name.endswith(held.recipe.digest[:8])


def test_what_does_not_fit_with_one_example_is_named(suite: Any) -> None:
    lora, full = suite().cells()[2].recipe, suite().cells()[1].recipe
    (room,), (more,) = needed(lora, 1), needed(full, 1)
    assert more > room  # it holds gradients and moments of every weight
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
