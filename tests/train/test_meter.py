"""Memory and speed of the steps alone."""

from __future__ import annotations

import sys

import pytest
import torch

from peftkit.train.meter import WARMUP_STEPS, Meter

MIB = 2**20
CPU = torch.device("cpu")


def step(meter: Meter, tokens: int) -> None:
    with meter.step():
        meter.count(samples=1, tokens=tokens, padded_tokens=tokens, loss_tokens=tokens)


def test_speed_is_told_from_steady_steps_alone() -> None:
    meter = Meter(CPU)
    for tokens in (1, 1, 10, 20):
        step(meter, tokens)
    meter.settle()
    step(meter, 1000)  # the first after other work
    step(meter, 30)
    assert meter.unsteady == [*range(WARMUP_STEPS), 4]
    meter.step_seconds = [9.0, 9.0, 1.0, 2.0, 9.0, 3.0]
    found = meter.throughput()
    assert found is not None
    assert found.tokens_per_second == (10 + 20 + 30) / (1 + 2 + 3)
    assert (found.step_seconds_p50, found.tokens) == (2.0, 1062)


def test_a_resumed_process_warms_up_again() -> None:
    first = Meter(CPU)
    for _ in range(4):
        step(first, 1)
    second = Meter(CPU)
    second.restore(first.state())
    for _ in range(3):
        step(second, 1)
    assert second.unsteady == [0, 1, 4, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_memory_of_what_happens_between_steps_is_not_the_trainings() -> None:
    meter = Meter(CPU)
    step(meter, 1)
    assert meter.baseline_bytes is not None
    torch.ones(200 * MIB // 4).sum()
    meter.settle()
    step(meter, 1)
    assert meter.peak_bytes - meter.baseline_bytes < 50 * MIB
    with meter.step():
        meter.count(samples=1, tokens=1, padded_tokens=1, loss_tokens=1)
        torch.ones(200 * MIB // 4).sum()
    assert meter.peak_bytes - meter.baseline_bytes > 190 * MIB
