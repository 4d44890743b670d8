"""What a run's steps hold: how long its examples are, from the data or else from the recipe's maximum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from peftkit.backbones.dims import Dims
from peftkit.data.batching import micro_batches, packs
from peftkit.data.features import Features
from peftkit.plan.sizes import Size, fully_labelled
from peftkit.recipe import Recipe
from peftkit.train.course import Course, parse_budget
from peftkit.train.loop import AUTO_TOKENS

SIMULATED_FORWARDS = 2
"""Forwards of a step that are run: gradients are there from the second on, and further ones repeat it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The examples of a run, as far as they decide its memory and time.

    Attributes:
        longest: the examples of the step that needs most memory.
        heaviest_step: its index in the run; None where the data are not at hand.
        first: the examples of the first step; empty where the data are not at hand.
        step_tokens: mean tokens of a step.
        num_examples: in the training split; None where the data are not at hand.
        source: whether lengths were counted in the data, or are the recipe's maximum.
    """

    longest: tuple[Size, ...]
    heaviest_step: int | None
    first: tuple[Size, ...]
    step_tokens: float
    num_examples: int | None
    source: Literal["data", "recipe"]

    def num_steps(self, recipe: Recipe) -> int | None:
        """Optimizer steps of the whole run; None when neither the recipe nor the data say it, or the clock does."""
        training = recipe.training
        amount, unit = parse_budget(training.budget)
        if unit == "tokens":
            return int(np.ceil(amount / self.step_tokens))
        if self.num_examples is None and training.max_steps is None and unit != "examples":
            return None
        return Course(training, [1] * (self.num_examples or training.batch_size), seed=recipe.seed).total_steps


def workload_at_most(recipe: Recipe, dims: Dims, *, num_examples: int | None = None) -> Workload:
    """Every example as long as the recipe and the backbone's positions allow."""
    length = min(recipe.training.max_tokens, dims.max_positions or recipe.training.max_tokens)
    count = min(recipe.training.batch_size, num_examples or recipe.training.batch_size)
    step = fully_labelled((length,) * count)
    return Workload(step, None, (), float(length * count), num_examples, "recipe")


def workload_of(recipe: Recipe, sizes: Sequence[Size]) -> Workload:
    """The steps that the recipe makes of these training examples."""
    tokens = np.asarray([size.tokens for size in sizes])
    course = Course(recipe.training, tokens, seed=recipe.seed)
    # by the clock nobody knows how many there will be: those of one pass stand for them
    steps = [course.examples(step) for step in range(course.total_steps or course.steps_per_epoch)]
    # of equals not the first one: the optimizer has no state in it yet
    heaviest = max(range(len(steps)), key=lambda index: (_weight(recipe, tokens[steps[index]]), index > 0))
    return Workload(
        tuple(sizes[row] for row in steps[heaviest]),
        heaviest,
        tuple(sizes[row] for row in steps[0]),
        float(np.mean([tokens[chosen].sum() for chosen in steps])),
        len(tokens),
        "data",
    )


def heaviest_forwards(recipe: Recipe, sizes: Sequence[Size], *, device: Literal["cuda", "cpu"]) -> tuple[Size, ...]:
    """Of the forwards that a step is cut into, the examples of the largest ones: enough to simulate."""
    groups = cut_step(recipe, [size.tokens for size in sizes], device=device) if sizes else []
    if len(groups) <= SIMULATED_FORWARDS:
        return tuple(sizes)
    largest = sorted(groups, key=lambda group: sum(map(len, group)), reverse=True)[:SIMULATED_FORWARDS]
    return tuple(sizes[example.row] for group in largest for example in group)


def _weight(recipe: Recipe, lengths: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> tuple[int, int]:
    """What a step's peak grows with: the tokens of its largest forward, then its longest example."""
    groups = cut_step(recipe, [int(length) for length in lengths], device="cpu")
    return max(sum(map(len, group)) for group in groups), int(lengths.max())


def cut_step(recipe: Recipe, lengths: Sequence[int], *, device: Literal["cuda", "cpu"]) -> list[list[Features]]:
    """A step's forwards, as the loop cuts them."""
    examples = [Features(np.empty(length, dtype=np.int32), 0, 1, row) for row, length in enumerate(lengths)]
    cut = packs if recipe.training.kernels.packing else micro_batches
    match recipe.training.micro_batch:
        case "auto":
            return list(cut(examples, max_tokens=AUTO_TOKENS[device]))
        case int(count):
            return list(cut(examples, max_examples=count))
        case budget:
            return list(cut(examples, max_tokens=int(budget.split()[0])))
