"""The optimizer steps of a run: which examples each of them sees, and where the run ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from peftkit.data.batching import step_order
from peftkit.recipe import Training

FIRST_GUESS = 100
"""Steps that a run by the clock is taken to have, until its first step has shown how long one takes."""


class Course:
    """A run's steps over training examples of these many tokens: so many epochs, so many steps, or a budget.

    Attributes:
        steps_per_epoch: of one pass over all examples.
        total_steps: of the whole run; None by the clock.
    """

    def __init__(self, training: Training, lengths: Sequence[int] | npt.NDArray[np.int64], *, seed: int) -> None:
        self.steps_per_epoch = math.ceil(len(lengths) / training.batch_size)
        self.total_steps: int | None = training.max_steps or math.ceil(training.epochs * self.steps_per_epoch)
        self._num_examples, self._batch_size, self._seed = len(lengths), training.batch_size, seed
        self._order: tuple[int, list[npt.NDArray[np.int64]]] = (-1, [])
        self._budget, self._unit = parse_budget(training.budget)
        self._spent: list[int] = []
        self._kept: int | None = None
        if self._unit == "seconds":
            self.total_steps = None
        elif self._unit:
            self._lay_out(np.asarray(lengths) if self._unit == "tokens" else np.ones(len(lengths), dtype=np.int64))

    def examples(self, step: int) -> npt.NDArray[np.int64]:
        """Positions of a step's examples; of a counted budget's last step, those that there is budget for."""
        chosen = self._ordered(step)
        return chosen[: self._kept] if self._kept is not None and step + 1 == self.total_steps else chosen

    def is_over(self, step: int, seconds: float) -> bool:
        """Whether the run ends before this step, after so many seconds of training steps."""
        return seconds >= self._budget if self.total_steps is None else step >= self.total_steps

    def horizon(self, step: int, seconds: float) -> float:
        """Steps of the run, as its schedule counts: `step / horizon` is the share of a budget that is spent."""
        if not self._unit:
            assert self.total_steps is not None
            return self.total_steps
        spent = seconds if self.total_steps is None else self._spent[min(step, len(self._spent) - 1)]
        return step * self._budget / spent if step and spent else self.total_steps or FIRST_GUESS

    def expected_steps(self, step: int, seconds: float) -> int:
        """How many steps the run has, as far as can be told by now; no fewer than were taken."""
        if self.total_steps is not None:
            return self.total_steps
        return step if self.is_over(step, seconds) else max(step + 1, round(self.horizon(step, seconds)))

    def seconds_left(self, step: int, seconds: float, *, step_seconds: float) -> float:
        """What the rest of the steps takes, at so many seconds each."""
        return (
            max(0.0, self._budget - seconds) if self.total_steps is None else (self.total_steps - step) * step_seconds
        )

    def _ordered(self, step: int) -> npt.NDArray[np.int64]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, step_order(self._num_examples, self._batch_size, seed=self._seed, epoch=epoch))
        return self._order[1][index]

    def _lay_out(self, costs: npt.NDArray[Any]) -> None:
        """Take steps until the budget is spent: the last one ends with the example that reaches it."""
        spent = 0
        while spent < self._budget:
            self._spent.append(spent)
            running = spent + np.cumsum(costs[self._ordered(len(self._spent) - 1)])
            self._kept = min(len(running), int(np.searchsorted(running, self._budget)) + 1)
            spent = int(running[self._kept - 1])
        self.total_steps = len(self._spent)


def parse_budget(text: str | None) -> tuple[int, str]:
    """`2000 examples` -> 2000 and its unit; 0 and no unit without a budget."""
    amount, _, unit = (text or "0").partition(" ")
    return int(amount), unit
