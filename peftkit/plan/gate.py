"""Before a run loads any weight: does it fit, and what do the recipe's `auto` settings become?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from peftkit.backbones.spec import Head
from peftkit.errors import DeviceBusy, DoesNotFit
from peftkit.plan.cards import this_machine
from peftkit.plan.measure import TensorPeak, watching_tensors
from peftkit.plan.planner import Plan, Planner
from peftkit.plan.search import find_fit
from peftkit.plan.workload import Workload
from peftkit.recipe import Recipe, Training
from peftkit.train.optimizers import Updates
from peftkit.units import format_bytes, format_seconds

CALIBRATING = 5
"""Real steps that correct the planned time; those that are watched tensor by tensor are slower and do not count."""
TOLERATED = 0.1
"""Fraction by which a real step may differ from its prediction before a person is told."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A run that fits.

    Attributes:
        training: the recipe's, with `auto` replaced where that was needed to fit.
    """

    plan: Plan
    training: Training

    def watch(self, device: torch.device, say: Say) -> StepWatch:
        """What looks at the run's first and heaviest step."""
        return StepWatch(self.plan, on_host=device.type == "cpu", say=say)


@dataclass(slots=True)
class StepWatch:
    """Counts the tensors of the first and the heaviest step on the host, and holds the first against its prediction;
    corrects the time that the run takes by a few real steps.

    On CUDA the allocator counts tensors, in every step.
    """

    plan: Plan
    on_host: bool
    say: Say
    _timed: list[tuple[float, int]] = field(default_factory=list)

    def during(self, step: int, model: nn.Module, updates: Updates) -> AbstractContextManager[TensorPeak | None]:
        """Around an optimizer step, counted from 0."""
        if self.on_host and self._is_watched(step):
            return watching_tensors(model, updates)
        return nullcontext()

    def judge(self, step: int, *, tensor_bytes: int, seconds: float, tokens: int) -> None:
        """Say so where the first step held much more or less than was planned; after a few more, how long it takes."""
        trouble = deviation(self.plan.simulation.first_step_bytes, tensor_bytes) if step == 0 else None
        if trouble is not None:
            self.say(trouble)
        if len(self._timed) < CALIBRATING and not self._is_watched(step):
            self._timed.append((seconds, tokens))
            if len(self._timed) == CALIBRATING:
                self._correct_time(step + 1)

    def _is_watched(self, step: int) -> bool:
        return step in (0, self.plan.workload.heaviest_step)

    def _correct_time(self, done: int) -> None:
        """The time left, from the seconds that a token took, where a good part of the run is still ahead."""
        planned, total = self.plan.step_seconds, self.plan.num_steps
        if planned is None or total is None or total < 4 * done:
            return
        rate = sum(seconds for seconds, _ in self._timed) / sum(tokens for _, tokens in self._timed)
        real = rate * self.plan.workload.step_tokens
        self.say(
            f"a step takes {format_seconds(real)} here, where the plan said {format_seconds(planned)}: "
            f"about {format_seconds(real * (total - done))} of training left"
        )


def admit(recipe: Recipe, head: Head, workload: Workload, *, say: Say) -> Admitted:
    """Plan a run on this machine; settings left to `auto` are changed where it would not fit otherwise.

    Raises:
        DoesNotFit: with what to try.
    """
    planner = Planner.open(recipe, head, this_machine())
    plan = planner.plan(recipe, workload)
    if plan.fits:
        say(_outlook(plan))
        return Admitted(plan, recipe.training)
    if recipe.training.micro_batch == "auto" and recipe.training.checkpointing == "auto":
        chosen = find_fit(recipe, planner, workload, only_cuts=True).chosen
        if chosen is not None:
            say(f"to fit {plan.card.name}: {', '.join(chosen.changes)}")
            say(_outlook(chosen.plan))
            return Admitted(chosen.plan, chosen.plan.recipe.training)
    raise DoesNotFit(
        f"{plan.trouble}. `peftkit plan RECIPE --fit` searches for changes that fit, `peftkit train RECIPE --fit` "
        "makes them, --no-plan trains all the same."
    )


def require_free(plan: Plan) -> None:
    """Refuse a run whose memory others hold at this moment.

    Raises:
        DeviceBusy: with how much is free.
    """
    if plan.card.kind == "cpu":
        import psutil

        free = int(psutil.virtual_memory().available)
    else:
        free = torch.cuda.mem_get_info()[0]
    if free < plan.needed_bytes:
        raise DeviceBusy(
            f"this run needs {format_bytes(plan.needed_bytes)}, and of the {format_bytes(plan.card.memory_bytes)} of "
            f"{plan.card.name} only {format_bytes(free)} are free. Wait for what holds the rest, or end it; "
            "--even-if-busy starts all the same."
        )


def deviation(predicted_bytes: int, measured_bytes: int) -> str | None:
    """A warning where a real step took more or less memory than was predicted for it, by more than is tolerated."""
    if abs(measured_bytes / predicted_bytes - 1) <= TOLERATED:
        return None
    return (
        f"warning: the first step held {format_bytes(measured_bytes)} in tensors at once, and the plan said "
        f"{format_bytes(predicted_bytes)} ({measured_bytes / predicted_bytes - 1:+.0%})"
    )


def _outlook(plan: Plan) -> str:
    needs = f"plan: {format_bytes(plan.needed_bytes)} of {format_bytes(plan.card.memory_bytes)}"
    return needs if plan.seconds is None else f"{needs}, about {format_seconds(plan.seconds)} of training"
