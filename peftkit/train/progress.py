"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from peftkit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from peftkit.tasks.base import Score
    from peftkit.train.loop import StepReport

PLAIN_EVERY_SECONDS = 10.0


class PlainObserver:
    """Lines on standard error: one at most every ten seconds while training, and whatever else happens."""

    def __init__(self) -> None:
        self._spoke = 0.0

    def on_step(self, report: StepReport) -> None:
        if time.monotonic() - self._spoke >= PLAIN_EVERY_SECONDS or report.step == report.total_steps:
            self._spoke = time.monotonic()
            self.say(
                f"step {report.step}/{report.total_steps}  {_facts(report)}  {format_seconds(report.seconds_left)} left"
            )

    def on_validation(self, step: int, loss: float, metrics: dict[str, Score]) -> None:
        scores = "  ".join(f"{name} {score.value:.4f}" for name, score in list(metrics.items())[:3])
        self.say(f"step {step}: validation loss {loss:.4f}  {scores}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class BarObserver:
    """A Rich progress bar on standard error, with lines above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
        )
        self._progress: Progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_step(self, report: StepReport) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=report.total_steps)
        text = f"{_facts(report)}  {format_seconds(report.seconds_left)} left"
        self._progress.update(self._task, completed=report.step, description=text)

    def on_validation(self, step: int, loss: float, metrics: dict[str, Score]) -> None:
        scores = "  ".join(f"{name} {score.value:.4f}" for name, score in list(metrics.items())[:3])
        self.say(f"step {step}: validation loss {loss:.4f}  {scores}")

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


def _facts(report: StepReport) -> str:
    rate = f"{report.tokens_per_second:.0f} tokens/s"
    return f"loss {report.loss:.4f}  {rate}  peak {format_bytes(report.peak_bytes)}"
