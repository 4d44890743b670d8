"""What a suite would run, before it runs: memory and time of every variant, and what does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftkit.bench.memory import held_to_memory
from peftkit.bench.suite import Suite
from peftkit.errors import InputError, MethodError
from peftkit.plan.answer import open_planner
from peftkit.plan.cards import Card, parse_gpu, this_machine
from peftkit.recipe import Recipe, build_recipe
from peftkit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from peftkit.plan.at_hand import AtHand
    from peftkit.plan.planner import Plan

START_SECONDS = 11.0
"""From a cell's start to its first step: imports, data, backbone, plan; measured with MiniLM-L6 on one core."""

BESIDE_THE_STEP = (
    *("seed", "evaluation.", "data.test", "data.limit.test", "data.limit.validation"),
    *("training.budget", "training.max_steps", "training.epochs", "training.learning_rate", "training.warmup"),
)
"""Keys in which recipes may differ whose steps take the same memory and time."""


@dataclass(frozen=True, slots=True)
class Line:
    """The cells of one variant, or its trials, which differ in seed or tuned values alone; planned for the first.

    Attributes:
        count: how many there are.
        plan: of its training; None for a prompting baseline, or where the method cannot work.
        scoring_seconds: of one of them: validation and test splits, as often as they are scored.
        trouble: why the method cannot work.
    """

    variant: str
    trials: bool
    count: int
    plan: Plan | None
    scoring_seconds: float | None
    trouble: str = ""

    @property
    def fits(self) -> bool:
        """Whether nothing about it is known to be too large."""
        return self.plan is None or self.plan.fits

    @property
    def seconds(self) -> float | None:
        """Of one of them, from its start; None where the rates of the card or the data are not known."""
        training = 0.0 if self.plan is None else self.plan.seconds
        if training is None or self.scoring_seconds is None:
            return None
        return START_SECONDS + training + self.scoring_seconds

    def document(self) -> dict[str, Any]:
        """As plain data; what is not known is absent."""
        plan = self.plan
        content = {
            "variant": self.variant,
            "kind": "trial" if self.trials else "cell",
            "count": self.count,
            "fits": self.fits,
            "needed_bytes": None if plan is None else plan.needed_bytes,
            "num_steps": None if plan is None else plan.num_steps,
            "train_seconds": None if plan is None else plan.seconds,
            "scoring_seconds": self.scoring_seconds,
            "seconds": self.seconds,
            "trouble": self.trouble or None,
        }
        return {key: value for key, value in content.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Preview:
    """All of a suite.

    Attributes:
        lines: trials first, as they run.
    """

    suite: str
    card: Card
    lines: tuple[Line, ...]

    @property
    def faulty(self) -> bool:
        """Whether some variant cannot work at all."""
        return any(line.trouble for line in self.lines)

    @property
    def fits(self) -> bool:
        """Whether nothing is too large."""
        return all(line.fits for line in self.lines)

    @property
    def seconds(self) -> float | None:
        """Of everything, one after another; at most, where trials are pruned. None where a part is not known."""
        each = [None if line.seconds is None else line.seconds * line.count for line in self.lines if not line.trouble]
        known = [seconds for seconds in each if seconds is not None]
        return sum(known) if len(known) == len(each) else None

    def document(self) -> dict[str, Any]:
        """As plain data."""
        total = {} if self.seconds is None else {"seconds": self.seconds}
        card = {"name": self.card.name, "memory_bytes": self.card.memory_bytes, "kind": self.card.kind}
        lines = [line.document() for line in self.lines]
        return {"suite": self.suite, "card": card, "fits": self.fits, **total, "cells": lines}


def preview(suite: Suite, gpu: str | None = None) -> Preview:
    """Plan every variant of the suite for the named card, or for this machine; nothing is written.

    Raises:
        RecipeError: the suite's faults.
        DoesNotFit: the suite's budget of memory is too little for some cells.
    """
    card = this_machine() if gpu is None else parse_gpu(gpu)
    return Preview(suite.name, card, tuple(_lines(suite, gpu)))


def _lines(suite: Suite, gpu: str | None) -> Iterator[Line]:
    """Trials, then cells; a trial whose steps are those of its variant's cells shares their simulation."""
    recipes: dict[str, list[Recipe]] = {}
    for cell in held_to_memory(suite, suite.cells(), gpu=gpu):
        recipes.setdefault(cell.variant, []).append(cell.recipe)
    planned = {variant: _planned(seeds[0], gpu) for variant, seeds in recipes.items()}
    for point in suite.tuned_points():
        assert suite.tune is not None
        recipe = suite.trial(point, suite.tune.ends(point.name)[0])
        variant = point.variant or recipe.label
        found = planned[variant]
        if not isinstance(found, str):
            found = found.of(recipe) if _alike(found.recipe, recipe) else _planned(recipe, gpu)
        yield _line(variant, found, suite.tune.trials, trials=True)
    for variant, seeds in recipes.items():
        yield _line(variant, planned[variant], len(seeds), trials=False)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A recipe, the plan of its steps (of a prompting baseline's, as if it trained), and what it scores."""

    recipe: Recipe
    plan: Plan
    hand: AtHand

    def of(self, recipe: Recipe) -> _Planned:
        """The same for a recipe whose steps are alike."""
        plan = replace(self.plan, recipe=recipe, num_steps=self.plan.workload.num_steps(recipe))
        return _Planned(recipe, plan, self.hand)


def _alike(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes differ in nothing that a step's memory or time depends on."""
    return all(key.startswith(BESIDE_THE_STEP) for key in one.differing_keys(other))


def _planned(recipe: Recipe, gpu: str | None) -> _Planned | str:
    """The recipe planned, or why its method cannot work."""
    asked = recipe if recipe.method.shots is None else _asking(recipe)
    try:
        planner, hand = open_planner(asked, gpu)
        return _Planned(recipe, planner.plan(asked, hand.workload(asked, planner.dims)), hand)
    except MethodError as fault:
        return str(fault)


def _line(variant: str, found: _Planned | str, count: int, *, trials: bool) -> Line:
    if isinstance(found, str):
        return Line(variant, trials, count, None, None, found)
    plan = found.plan if found.recipe.method.shots is None else None
    return Line(variant, trials, count, plan, _scoring_seconds(found.recipe, found.plan, found.hand))


def _asking(recipe: Recipe) -> Recipe:
    """A recipe that trains next to nothing, whose forwards are those of a prompting baseline."""
    content = recipe.to_dict()
    return build_recipe(content | {"method": {"kind": "prompt", "virtual_tokens": 1}})


def _scoring_seconds(recipe: Recipe, plan: Plan, hand: AtHand) -> float | None:
    """Forwards over what is scored, its examples taken to be as long as those of training."""
    if plan.forward_seconds is None or plan.workload.num_examples is None:
        return None
    examples = min(recipe.training.batch_size, plan.workload.num_examples)
    shots = recipe.method.shots
    scored = sum(hand.num_scored.values())
    if shots is None:
        scored += hand.num_scored.get("validation", 0) * _validations(recipe, plan)
    return plan.forward_seconds / examples * scored * (1 + (shots or 0))


def _validations(recipe: Recipe, plan: Plan) -> int:
    """How often the validation split is scored while training; the kept weights are scored once more at the end."""
    every = recipe.evaluation.every
    if every == "never" or plan.num_steps is None or plan.workload.num_examples is None:
        return 0
    steps = math.ceil(plan.workload.num_examples / recipe.training.batch_size) if every == "epoch" else every
    return math.ceil(plan.num_steps / steps)


def render_preview(found: Preview) -> RenderableType:
    """A line a variant, its trials apart, the total and the verdict."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("variant", overflow="fold")
    for column in ("cells", "needs", "", "training", "scoring", "each", "all"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in found.lines:
        table.add_row(*(Text(cell) for cell in _cells(line)), style="" if line.fits and not line.trouble else "red")
    return Group(table, "", *(Text(text) for text in _verdict(found)))


def _cells(line: Line) -> Sequence[str]:
    plan, each = line.plan, line.seconds
    return (
        f"tuning {line.variant}" if line.trials else line.variant,
        str(line.count),
        "–" if plan is None else format_bytes(plan.needed_bytes),
        "cannot work" if line.trouble else "" if plan is None else "fits" if plan.fits else "too large",
        "–" if plan is None else _told(plan.seconds),
        _told(line.scoring_seconds),
        _told(each),
        _told(None if each is None else each * line.count),
    )


def _told(seconds: float | None) -> str:
    return "?" if seconds is None else format_seconds(seconds)


def _verdict(found: Preview) -> Iterator[str]:
    for line in found.lines:
        if line.trouble:
            yield f"{line.variant} cannot work: {line.trouble}"
        elif line.plan is not None and not line.plan.fits:
            yield f"{line.variant} does not fit: {line.plan.trouble}"
    count = sum(line.count for line in found.lines)
    card = f"{found.card.name} ({format_bytes(found.card.memory_bytes)})"
    if found.seconds is None:
        yield f"{count} cells on {card}; time unknown: name the card instead of its size, and have the data at hand"
        return
    most = "at most " if any(line.trials for line in found.lines) else ""
    yield (
        f"{count} cells on {card}: {most}{format_seconds(found.seconds)} one after another, of which "
        f"{format_seconds(START_SECONDS)} a cell to start it"
    )


def exit_code(found: Preview) -> int:
    """3 where something does not fit, 2 where a variant cannot work at all, else 0."""
    from peftkit.errors import DOES_NOT_FIT

    if not found.fits:
        return DOES_NOT_FIT
    return InputError.exit_code if found.faulty else 0
