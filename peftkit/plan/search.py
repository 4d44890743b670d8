"""The fastest way to make a run fit a card: what to change, and what each change gives up.

Nothing that could change the outcome is given up before speed is:

    size of a forward, recomputed layers  ->  Adam's moments in 8 bits  ->  NF4 weights  ->  shorter examples

The optimizer step holds the same examples whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from peftkit.errors import MethodError
from peftkit.plan.cards import Card
from peftkit.plan.estimate import Rates, rates_of, step_seconds
from peftkit.plan.planner import Plan, Planner
from peftkit.plan.workload import Workload, heaviest_forwards, workload_at_most
from peftkit.recipe import Recipe, build_recipe

LARGEST_FORWARD = 8192
"""Tokens of a forward beyond which a larger one is no faster."""
SHORTEST = 256
"""Tokens below which examples are not cut."""
NOTICEABLE = 0.03
"""Share of the memory below which an optimizer's state is not worth shrinking."""
USUAL_CARD = Card("", 0, bandwidth_bytes_per_second=360e9, half_tflops=25.5)
"""Whose rates rank the options on a card that is known by its memory alone."""


@dataclass(frozen=True, slots=True)
class Option:
    """A recipe with some changes, planned.

    Attributes:
        changes: overrides of the recipe.
        gives_up: what the changes cost besides time.
        time_ratio: of a step, to the recipe as it was written.
    """

    changes: tuple[str, ...]
    gives_up: str
    plan: Plan
    time_ratio: float


Cut = Callable[[int, str | int], Option]
"""Plans a forward of so many tokens with this checkpointing."""


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search.

    Attributes:
        options: what was tried, in the order of giving up; the first is the recipe as it was written.
        chosen: the first of them that fits, made as fast as it can be; None where nothing does.
    """

    options: tuple[Option, ...]
    chosen: Option | None


@dataclass(frozen=True, slots=True)
class _Level:
    """Changes of a kind, before the forwards are cut."""

    changes: tuple[str, ...]
    gives_up: str


def find_fit(recipe: Recipe, planner: Planner, workload: Workload | None = None, *, only_cuts: bool = False) -> Found:
    """Search for the fastest recipe that fits the planner's card and gives up least.

    Args:
        workload: of the recipe's data; None takes its maximum length.
        only_cuts: change nothing but how a step is cut into forwards and which layers recompute.
    """
    rates = planner.rates or rates_of(USUAL_CARD)
    assert rates is not None, "the usual card has rates"
    tried = _Tried(recipe, planner, workload or workload_at_most(recipe, planner.dims), rates)
    options = [tried.option((), "nothing")]
    levels = [_Level((), "nothing")] if only_cuts else _levels(recipe, planner, options[0].plan)
    for level in levels:
        found = list(_cuts(tried, level))
        options += [option for option in found if option.changes not in [known.changes for known in options]]
        fitting = [option for option in found if option.plan.fits]
        if fitting:
            best = min(fitting, key=lambda option: option.time_ratio)
            keeps = options[0].plan.fits and best.time_ratio >= 1
            return Found(tuple(options), options[0] if keeps else best)
    return Found(tuple(options), None)


@dataclass(slots=True)
class _Tried:
    """Plans variations of one recipe."""

    recipe: Recipe
    planner: Planner
    workload: Workload
    rates: Rates
    base_seconds: float | None = None

    def option(self, changes: Sequence[str], gives_up: str) -> Option:
        recipe = build_recipe(self.recipe.to_dict(), changes)
        workload = self.shortened(recipe)
        plan = self.planner.plan(recipe, workload)
        run = heaviest_forwards(recipe, workload.longest, device=self.planner.card.kind)
        scale = workload.step_tokens / sum(size.tokens for size in run)
        seconds = step_seconds(plan.simulation, self.rates, scale=scale)
        self.base_seconds = seconds if self.base_seconds is None else self.base_seconds
        return Option(tuple(changes), gives_up, plan, seconds / self.base_seconds)

    def shortened(self, recipe: Recipe) -> Workload:
        """The workload with no example longer than the recipe allows."""
        limit = recipe.training.max_tokens
        longest, first = (
            tuple(size.cut(limit) for size in step) for step in (self.workload.longest, self.workload.first)
        )
        share = sum(size.tokens for size in longest) / sum(size.tokens for size in self.workload.longest)
        return replace(self.workload, longest=longest, first=first, step_tokens=self.workload.step_tokens * share)


def _levels(recipe: Recipe, planner: Planner, plan: Plan) -> Iterator[_Level]:
    """What can be given up, least first; each level keeps what those before it gave."""
    changes: tuple[str, ...] = ()
    given: list[str] = []
    yield _Level(changes, "nothing")
    state = plan.simulation.terms.get("optimizer state", 0)
    if recipe.training.optimizer == "adamw" and state > NOTICEABLE * plan.simulation.allocated_bytes:
        changes, given = (*changes, "training.optimizer=adamw-8bit"), [*given, "Adam's moments in 8 bits"]
        yield _Level(changes, ", ".join(given))
    if recipe.backbone.quantization == "none" and _takes_nf4(recipe, planner):
        changes, given = (*changes, "backbone.quantization=nf4"), [*given, "weights in NF4"]
        yield _Level(changes, ", ".join(given))
    length = min(recipe.training.max_tokens, planner.dims.max_positions or recipe.training.max_tokens)
    while length // 2 >= SHORTEST:
        length //= 2
        yield _Level((*changes, f"training.max_tokens={length}"), ", ".join([*given, f"text beyond {length} tokens"]))


def _takes_nf4(recipe: Recipe, planner: Planner) -> bool:
    try:
        recipe.method.check(planner.dims, recipe.task.kind, "nf4")
    except MethodError:
        return False
    return True


def _cuts(tried: _Tried, level: _Level) -> Iterator[Option]:
    """Ways to cut the step at a level, until one fits: without recomputing, of some layers, of all."""
    limited = build_recipe(tried.recipe.to_dict(), level.changes)
    lengths = [size.tokens for size in tried.shortened(limited).longest]
    one = max(lengths)

    def at(tokens: int, checkpointing: str | int) -> Option:
        cut = (f"training.micro_batch={tokens} tokens", f"training.checkpointing={checkpointing}")
        return tried.option((*level.changes, *cut), level.gives_up)

    plain = at(one, "off")
    yield plain
    if plain.plan.fits:
        yield from _larger(at, plain, one, min(sum(lengths), LARGEST_FORWARD), "off")
        return
    full = at(one, "all")
    yield full
    if not full.plan.fits:
        return
    some = _some_layers(at, plain, full, one, tried.planner.dims.layers)
    if some is not None:
        yield some
    yield from _larger(at, full, one, min(sum(lengths), LARGEST_FORWARD), "all")


def _larger(at: Cut, smallest: Option, one: int, most: int, checkpointing: str) -> Iterator[Option]:
    """The largest forward that fits, by the memory that two sizes take: it grows by the token."""
    if 2 * one > most:
        return
    second = at(2 * one, checkpointing)
    yield second
    if not second.plan.fits:
        return
    slope = (second.plan.needed_bytes - smallest.plan.needed_bytes) / one
    room = second.plan.card.memory_bytes - second.plan.needed_bytes
    tokens = min(most, 2 * one + int(room / slope) if slope > 0 else most) // one * one
    while tokens > 2 * one:
        option = at(tokens, checkpointing)
        yield option
        if option.plan.fits:
            return
        tokens = (tokens // 2) // one * one


def _some_layers(at: Cut, plain: Option, full: Option, one: int, layers: int) -> Option | None:
    """The fewest recomputed layers with which it fits: each spares about the same; None where it takes all."""
    spared = plain.plan.needed_bytes - full.plan.needed_bytes
    missing = plain.plan.needed_bytes - plain.plan.card.memory_bytes
    count = -(-missing * layers // spared) if spared > 0 else layers
    while count < layers:
        option = at(one, count)
        if option.plan.fits:
            return option
        count += max(1, layers // 10)
    return None
