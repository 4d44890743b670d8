"""Time, tokens and peak memory of the training steps alone: evaluation and checkpoints are outside of it."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch

from peftkit.record import Energy, Memory, Throughput
from peftkit.train.energy import EnergyCounter

WARMUP_STEPS = 2
"""First steps of a process that its speed is not told from: allocations and caches settle in them."""


class TensorPeak(Protocol):
    """Most bytes that tensors held at once, once the step is over."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(slots=True)
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what the body takes to a phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(slots=True)
class Meter:
    """Counters of one run. They are part of a checkpoint, so that a resumed run reports the whole.

    Attributes:
        tensor_bytes: most that tensors held at once in the last step that was watched; 0 before.
        tensor_peak_bytes: the largest of these.
        step_tokens: of each step, without padding.
        unsteady: the steps that the speed is not told from: warm-up, the first after other work, watched ones.
    """

    device: torch.device
    counter: EnergyCounter | None = None
    samples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    loss_tokens: int = 0
    train_seconds: float = 0.0
    cpu_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    unsteady: list[int] = field(default_factory=list)
    joules: float = 0.0
    counted_seconds: float = 0.0
    warming: int = WARMUP_STEPS
    baseline_bytes: int | None = None
    peak_bytes: int = 0
    tensor_peak_bytes: int = 0
    tensor_bytes: int = 0

    @contextmanager
    def step(self, watched: AbstractContextManager[TensorPeak | None] | None = None) -> Iterator[None]:
        """Measure one optimizer step.

        Args:
            watched: counts the tensors of this step; on CUDA the allocator does.
        """
        if self.baseline_bytes is None:
            self.settle()
            self.baseline_bytes = self._held()
        self._reset_peak()
        tokens, joules = self.tokens, self.counter.joules() if self.counter is not None else 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        with watched or nullcontext() as peak:
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - wall
        self.train_seconds += seconds
        self.cpu_seconds += time.process_time() - cpu
        if self.counter is not None:
            self.joules += self.counter.joules() - joules
            self.counted_seconds += seconds
        if self.warming or peak is not None:
            self.unsteady.append(len(self.step_seconds))
            self.warming = max(0, self.warming - 1)
        self.step_seconds.append(seconds)
        self.step_tokens.append(self.tokens - tokens)
        self._read_peak()
        if peak is not None:
            self.tensor_bytes = peak.num_bytes
        self.tensor_peak_bytes = max(self.tensor_peak_bytes, self.tensor_bytes)

    def count(self, *, samples: int, tokens: int, padded_tokens: int, loss_tokens: int) -> None:
        """Add one forward's examples; `padded_tokens` includes the padding, `tokens` does not."""
        self.samples += samples
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        self.loss_tokens += loss_tokens

    def throughput(self) -> Throughput | None:
        """The totals, or None when no step was taken."""
        if not self.step_seconds:
            return None
        every = range(len(self.step_seconds))
        kept = sorted(set(every) - set(self.unsteady)) or every
        steady = [self.step_seconds[step] for step in kept]
        return Throughput(
            samples=self.samples,
            tokens=self.tokens,
            loss_tokens=self.loss_tokens,
            padding_fraction=1 - self.tokens / self.padded_tokens,
            train_seconds=self.train_seconds,
            cpu_seconds=self.cpu_seconds,
            tokens_per_second=sum(self.step_tokens[step] for step in kept) / sum(steady),
            step_seconds_p50=float(np.percentile(steady, 50)),
            step_seconds_p90=float(np.percentile(steady, 90)),
        )

    def memory(self) -> Memory:
        """Peaks over all steps: reserved by the allocator on CUDA, resident set elsewhere."""
        on_cuda = self.device.type == "cuda"
        return Memory(
            kind="cuda-reserved" if on_cuda else "rss",
            baseline_bytes=self.baseline_bytes,
            peak_bytes=self.peak_bytes or None,
            tensor_peak_bytes=self.tensor_peak_bytes or None,
        )

    def energy(self) -> Energy | None:
        """What the training steps took in; None where no counter could be read."""
        if self.counter is None or not self.counted_seconds:
            return None
        return Energy(joules=self.joules, source=self.counter.source, seconds=self.counted_seconds)

    def settle(self) -> None:
        """Give back memory that other work left unused, lest it count as the training's; the next step is slower."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            _give_back()
        self.warming = max(1, self.warming)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {name: getattr(self, name) for name in self.__slots__ if name not in ("device", "counter", "warming")}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's counters."""
        for name, value in state.items():
            setattr(self, name, value)

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return int(psutil.Process().memory_info().rss)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_high_water()

    def _read_peak(self) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_reserved(self.device))
            self.tensor_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak_bytes = max(self.peak_bytes, _high_water() or self._held())


def _give_back() -> None:
    """glibc: return freed memory to the system, which otherwise keeps it for the process."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


def _reset_high_water() -> None:
    """Linux: set the resident high-water mark back to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _high_water() -> int | None:
    """Linux: the resident high-water mark in bytes; None where it is not kept."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def make_resident(model: torch.nn.Module) -> None:
    """Read a byte of every page of the weights on the host: mapped files take memory only once they are read, which
    would count as the training's."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())[::4096].sum()
