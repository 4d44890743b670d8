"""Cells on this machine: one after another, or several at once."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peftkit.bench.devices import require_idle, visible_devices
from peftkit.bench.forkserver import ForkServer, can_fork
from peftkit.bench.process import CellResult, Conditions, FreshProcess, Launch, Say, Settler
from peftkit.bench.suite import Cell
from peftkit.errors import InputError


@dataclass(frozen=True, slots=True)
class Local:
    """Runs cells in processes of this machine.

    Attributes:
        jobs: cells at once. On the processor they share its threads; on GPUs each has a device of its own.
        launch: starts a cell's process; None forks it where that is safe, and starts a new interpreter elsewhere.
    """

    jobs: int = 1
    launch: Launch | None = None

    def check(self, conditions: Conditions) -> None:
        """Refuse what cannot be measured here, before anything is written.

        Raises:
            InputError: more cells at once than there are devices.
            DeviceBusy: a device's memory is in use.
        """
        if self.jobs < 1:
            raise InputError(f"--jobs={self.jobs} runs nothing. Give 1 or more.")
        devices = visible_devices()
        if devices and self.jobs > len(devices):
            raise InputError(f"--jobs={self.jobs} with {len(devices)} CUDA device(s): a cell needs one of its own.")
        if not conditions.even_if_busy:
            require_idle(first_only=self.jobs == 1)

    def run(self, cells: Sequence[tuple[Cell, Path]], conditions: Conditions, say: Say) -> Iterator[CellResult]:
        """Each cell's result, as they end. Left early, the generator ends what it has running.

        Cells that another harness is running, or that find too little memory free beside others, are taken up again
        after all the others, one at a time.
        """
        slots: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for variables in self._slots():
            slots.put(variables)
        deferred: list[tuple[Cell, Path]] = []
        with ExitStack() as opened:
            launch = self.launch or (opened.enter_context(closing(ForkServer())) if can_fork() else FreshProcess)
            round_of = partial(self._pass, conditions=conditions, launch=launch, say=say, slots=slots)
            yield from round_of(cells, deferred=deferred)
            if deferred:
                yield from round_of(deferred, deferred=None)

    def _pass(
        self,
        cells: Sequence[tuple[Cell, Path]],
        *,
        conditions: Conditions,
        launch: Launch,
        say: Say,
        slots: queue.SimpleQueue[Mapping[str, str]],
        deferred: list[tuple[Cell, Path]] | None,
    ) -> Iterator[CellResult]:
        """One round over the cells. Those not settled go to `deferred`; without it, they are waited for, one by one.

        Threads watch over processes; whatever is told and yielded comes from the caller's own.
        """
        events: queue.SimpleQueue[str | tuple[int, Future[CellResult | None]]] = queue.SimpleQueue()
        cancelled = threading.Event()
        settler = Settler(conditions, launch, events.put, cancelled)

        def settle(cell: Cell, folder: Path) -> CellResult | None:
            variables = slots.get()
            try:
                return settler.settle(cell, folder, variables=variables, wait=deferred is None)
            finally:
                slots.put(variables)

        def ended(index: int, future: Future[CellResult | None]) -> None:
            events.put((index, future))

        with ThreadPoolExecutor(1 if deferred is None else self.jobs) as pool:
            try:
                for index, (cell, folder) in enumerate(cells):
                    future = pool.submit(settle, cell, folder)
                    future.add_done_callback(partial(ended, index))
                pending = len(cells)
                while pending:
                    event = events.get()
                    if isinstance(event, str):
                        say(event)
                        continue
                    pending -= 1
                    result = event[1].result()
                    if result is not None:
                        yield result
                    elif deferred is not None:
                        deferred.append(cells[event[0]])
            finally:
                cancelled.set()
                pool.shutdown(cancel_futures=True)

    def _slots(self) -> list[dict[str, str]]:
        """Variables of each cell that runs at the same time."""
        if self.jobs == 1:
            return [{}]
        devices = visible_devices()
        if devices:
            return [{"CUDA_VISIBLE_DEVICES": device.uuid} for device in devices[: self.jobs]]
        threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
        shared = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        return [dict(shared) for _ in range(self.jobs)]
