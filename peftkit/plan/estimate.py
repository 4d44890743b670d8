"""How long a step takes: its operations and bytes against a device's rates.

An operator takes the longer of flops / (efficiency x flops a second) and bytes / (efficiency x bytes a second)
(Williams et al. 2009, the roofline); a step is one operator after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from peftkit.plan.cards import Card
from peftkit.plan.simulation import Simulation

STEP = ("forward", "loss", "backward", "optimizer")
"""The phases of a step that is timed."""
FORWARD = ("forward", "loss")
PRODUCT_EFFICIENCY = {"cuda": 0.6, "cpu": 0.8}
"""Share of the rated products that training reaches: data sheets state what large products at boost clock give."""
TRAFFIC_EFFICIENCY = {"cuda": 0.75, "cpu": 0.8}
"""The same of the bandwidth."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second.

    Attributes:
        flops: in matrix products of the dtype that a run computes in.
        moved_bytes: read and written by everything else.
    """

    flops: float
    moved_bytes: float


def rates_of(card: Card) -> Rates | None:
    """The rates that a table or a measurement gives; None for a card known by its memory alone."""
    if card.kind == "cpu":
        return _measured()
    flops = card.half_tflops if card.half_tflops is not None else card.fp32_tflops
    if flops is None or card.bandwidth_bytes_per_second is None:
        return None
    return Rates(
        flops * 1e12 * PRODUCT_EFFICIENCY["cuda"], card.bandwidth_bytes_per_second * TRAFFIC_EFFICIENCY["cuda"]
    )


def step_seconds(simulation: Simulation, rates: Rates, *, scale: float) -> float:
    """Time of an optimizer step.

    Args:
        scale: tokens of the step over the tokens that were simulated; the optimizer's work does not grow with them.
    """
    return _seconds(simulation, rates, STEP, scale=scale)


def forward_seconds(simulation: Simulation, rates: Rates, *, scale: float) -> float:
    """Time of a step's forwards alone, which is what scoring its examples takes."""
    return _seconds(simulation, rates, FORWARD, scale=scale)


def _seconds(simulation: Simulation, rates: Rates, phases: Sequence[str], *, scale: float) -> float:
    seconds = 0.0
    for phase, flops, moved_bytes in simulation.work:
        if phase in phases:
            once = max(flops / rates.flops, moved_bytes / rates.moved_bytes)
            seconds += once if phase == "optimizer" else once * scale
    return seconds


@cache
def _measured() -> Rates:
    """This host's rates, from a few products and copies; takes a fraction of a second."""
    x = torch.randn(1024, 1024)
    source = torch.ones(2**24)
    target = torch.empty_like(source)

    flops = 2 * 1024**3 / _median_seconds(lambda: x @ x)
    moved = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))
    return Rates(flops * PRODUCT_EFFICIENCY["cpu"], moved * TRAFFIC_EFFICIENCY["cpu"])


def _median_seconds(work: Callable[[], object], *, repeats: int = 5) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return median(seconds)
