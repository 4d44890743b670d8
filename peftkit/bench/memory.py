"""Equal memory: every cell gets the largest forward that plans to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from peftkit.bench.suite import Cell, Suite, named_cell
from peftkit.errors import DoesNotFit
from peftkit.plan.cards import Card, parse_gpu, this_machine
from peftkit.recipe import Recipe, build_recipe
from peftkit.units import format_bytes

if TYPE_CHECKING:
    from peftkit.plan.planner import Plan


def held_to_memory(suite: Suite, cells: Sequence[Cell], *, gpu: str | None = None) -> list[Cell]:
    """The cells, those that train with the largest `training.micro_batch` whose plan stays within the suite's budget.

    Planned once a variant, for its first seed. Without a budget of memory the cells are as they were.

    Args:
        gpu: a card to plan for; None is this machine.

    Raises:
        DoesNotFit: even one example a forward is too much for some variants; all are named.
    """
    memory = None if suite.budget is None else suite.budget.memory
    if memory is None:
        return list(cells)
    card = replace(this_machine() if gpu is None else parse_gpu(gpu), memory_bytes=parse_gpu(memory).memory_bytes)
    counts: dict[str, int | None] = {}
    troubles = []
    for cell in cells:
        if cell.variant not in counts:
            try:
                counts[cell.variant] = _largest_forward(cell.recipe, card)
            except DoesNotFit as fault:
                counts[cell.variant] = None
                troubles.append(f"\n  - {cell.variant}: {fault}")
    if troubles:
        raise DoesNotFit(f"budget.memory={memory} is too little. Raise it, or exclude these:{''.join(troubles)}")
    return [_with_forward(cell, counts[cell.variant]) for cell in cells]


def _with_forward(cell: Cell, count: int | None) -> Cell:
    return cell if count is None else named_cell(cell.variant, _cut(cell.recipe, count))


def _cut(recipe: Recipe, count: int) -> Recipe:
    return build_recipe(recipe.to_dict(), [f"training.micro_batch={count}"])


def _largest_forward(recipe: Recipe, card: Card) -> int | None:
    """Most examples of a forward within the memory of the card; None for a prompting baseline, which trains nothing."""
    if recipe.method.shots is not None:
        return None
    from peftkit.plan.at_hand import look
    from peftkit.plan.planner import Planner

    hand = look(recipe)
    planner = Planner.open(recipe, hand.head, card)
    workload = hand.workload(recipe, planner.dims)

    def needed(count: int) -> int:
        return own_bytes(planner.plan(_cut(recipe, count), workload))

    count = largest(lambda count: needed(count) <= card.memory_bytes, recipe.training.batch_size)
    if count == 0:
        raise DoesNotFit(f"needs {format_bytes(needed(1))} with one example a forward")
    return count


def own_bytes(plan: Plan) -> int:
    """What a plan needs, the margin included, less what a host's process holds before the run: it differs each time."""
    context = plan.simulation.context_bytes if plan.card.kind == "cpu" else 0
    return plan.needed_bytes - round(context * (1 + plan.margin))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` that fits, 0 where not even 1 does; below one that fits, all do."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
