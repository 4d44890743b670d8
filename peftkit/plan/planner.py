"""A recipe and a card become a plan: memory by term, whether it fits, and how long the run takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from peftkit.backbones.dims import Dims, read_dims
from peftkit.backbones.load import build_skeleton, read_config
from peftkit.backbones.spec import Head
from peftkit.errors import InputError
from peftkit.files import write_json
from peftkit.plan.cards import Card
from peftkit.plan.cuda_operators import Architecture
from peftkit.plan.estimate import Rates, forward_seconds, rates_of, step_seconds
from peftkit.plan.known import Streams
from peftkit.plan.peer import settings_of, simulate_peer
from peftkit.plan.simulate import simulate
from peftkit.plan.simulation import Simulation
from peftkit.plan.workload import Workload, heaviest_forwards, workload_at_most
from peftkit.recipe import Recipe
from peftkit.train.course import parse_budget
from peftkit.units import format_bytes

RECORDED = Path(__file__).parent / "recorded_error.json"
"""Written by `plan_accuracy.py --record` and `plan_host.py --record` in benchmarks/."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs of a device, and whether the device has it.

    Attributes:
        workload: the examples of its steps.
        simulation: of the step that needs most.
        margin: fraction that is added to what was simulated: the planner's largest recorded error.
        step_seconds: of a mean step; None for a card whose rates are not known.
        num_steps: None where neither recipe nor data say it, or the clock does.
        forward_seconds: of a mean step's forwards alone.
    """

    recipe: Recipe
    card: Card
    workload: Workload
    simulation: Simulation
    total_params: int
    trainable_params: int
    margin: float
    step_seconds: float | None
    num_steps: int | None
    forward_seconds: float | None = None

    @property
    def needed_bytes(self) -> int:
        """What the device must have free, the margin included."""
        return round(self.simulation.total_bytes * (1 + self.margin))

    @property
    def fits(self) -> bool:
        """Whether the device has it."""
        return self.needed_bytes <= self.card.memory_bytes

    @property
    def seconds(self) -> float | None:
        """All training steps; evaluation, loading and tokenisation are not in it."""
        amount, unit = parse_budget(self.recipe.training.budget)
        if unit == "seconds":
            return float(amount)
        if self.step_seconds is None or self.num_steps is None:
            return None
        return self.step_seconds * self.num_steps

    @property
    def trouble(self) -> str:
        """Why it does not fit, in one sentence."""
        term, num_bytes = max(self.simulation.terms.items(), key=lambda item: item[1])
        return (
            f"this run needs {format_bytes(self.needed_bytes)} and {self.card.name} has "
            f"{format_bytes(self.card.memory_bytes)} ({term} {format_bytes(num_bytes)})"
        )

    def document(self) -> dict[str, Any]:
        """The plan as plain data; what is not known is absent. Bytes and seconds."""
        found = self.simulation
        content = {
            "label": self.recipe.label,
            "backbone": self.recipe.backbone.name,
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "total_bytes": found.total_bytes,
            "allocated_bytes": found.allocated_bytes,
            "reserved_bytes": found.reserved_bytes,
            "context_bytes": found.context_bytes,
            "margin": self.margin,
            "card": {"name": self.card.name, "memory_bytes": self.card.memory_bytes, "kind": self.card.kind},
            "phase": found.phase,
            "terms": found.terms,
            "layers": {str(layer): kinds for layer, kinds in found.layers.items()},
            "phase_peaks": found.phase_peaks,
            "parameters": {"total": self.total_params, "trainable": self.trainable_params},
            "lengths": {"source": self.workload.source, "longest": max(self.workload.longest).tokens},
            "step_seconds": self.step_seconds,
            "num_steps": self.num_steps,
            "seconds": self.seconds,
        }
        return {key: value for key, value in content.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans recipes of one backbone for one card, so that a search reads the configuration once."""

    card: Card
    head: Head
    config: Any
    dims: Dims
    rates: Rates | None
    streams: Streams = field(default_factory=Streams, repr=False)

    @classmethod
    def open(cls, recipe: Recipe, head: Head, card: Card) -> Planner:
        """Read the backbone's configuration; nothing else of it is needed.

        Raises:
            BackboneError: the configuration cannot be had.
        """
        config = read_config(recipe.backbone)
        return cls(card, head, config, read_dims(config, build_skeleton(config, head), head), rates_of(card))

    def plan(self, recipe: Recipe, workload: Workload | None = None) -> Plan:
        """Simulate the recipe's step and hold it against the card.

        Args:
            workload: of its data; None takes every example at the recipe's maximum length.

        Raises:
            MethodError: the method cannot work on this backbone.
        """
        recipe.method.check(self.dims, recipe.task.kind, recipe.backbone.quantization)
        workload = workload or workload_at_most(recipe, self.dims)
        kind = self.card.kind
        heaviest, first = (heaviest_forwards(recipe, step, device=kind) for step in (workload.longest, workload.first))
        found = simulate(
            recipe,
            self.head,
            sizes=heaviest,
            first=first,
            device=kind,
            architecture=architecture_of(self.card),
            config=self.config,
            known=self.streams,
        )
        if kind == "cpu":
            found = on_host(found)
        return self._plan(recipe, workload, found, scale=workload.step_tokens / sum(size.tokens for size in heaviest))

    def plan_peer(self, recipe: Recipe, workload: Workload | None = None) -> Plan:
        """The same recipe as a plain transformers and PEFT trainer would run it.

        Raises:
            InputError: this machine has no CUDA device and none was named, or such a trainer is not known.
        """
        if self.card.kind == "cpu":
            raise InputError("--as peer predicts runs on a card: name it, as in --gpu 'RTX 3060' or --gpu 12GiB.")
        recipe.method.check(self.dims, recipe.task.kind, recipe.backbone.quantization)
        workload = workload or workload_at_most(recipe, self.dims)
        settings = settings_of(
            recipe, self.dims, self.config, sizes=workload.longest, architecture=architecture_of(self.card)
        )
        found = simulate_peer(settings, copy.deepcopy(self.config))
        scale = recipe.training.batch_size / settings.batch  # forwards of a step, each padded to its longest
        return self._plan(recipe, workload, found, scale=scale)

    def _plan(self, recipe: Recipe, workload: Workload, found: Simulation, *, scale: float) -> Plan:
        rates = self.rates
        return Plan(
            recipe=recipe,
            card=self.card,
            workload=workload,
            simulation=found,
            total_params=self.dims.num_params,
            trainable_params=recipe.method.trainable_params(self.dims),
            margin=recorded_margin(self.card.kind),
            step_seconds=None if rates is None else step_seconds(found, rates, scale=scale),
            forward_seconds=None if rates is None else forward_seconds(found, rates, scale=scale),
            num_steps=workload.num_steps(recipe),
        )


def architecture_of(card: Card) -> Architecture:
    """What of a card decides memory; without a name, a common one with bfloat16."""
    if card.bfloat16 is False:
        return Architecture(capability=(7, 5))
    hopper = any(name in card.name for name in ("H100", "H200"))
    return Architecture(capability=(9, 0)) if hopper else Architecture()


def on_host(found: Simulation) -> Simulation:
    """The simulation with what this process holds already, Python and its libraries, in the place of a context."""
    resident = int(psutil.Process().memory_info().rss)
    return replace(found, context_bytes=resident, terms=found.terms | {"context": resident})


@cache
def recorded_margin(kind: str) -> float:
    """The largest fraction by which the planner came out below a measured run, on this kind of device."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    return float(recorded[kind]["largest_underestimate"])


def record_margin(kind: str, errors: Sequence[float]) -> None:
    """Take these errors, predicted / measured - 1, as what is known of a kind of device."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    worst = round(max(0.0, *(-error for error in errors)), 4)
    write_json(RECORDED, recorded | {kind: {"largest_underestimate": worst, "runs": len(errors)}})
