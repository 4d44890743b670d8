"""The training loop. One for all methods and tasks: it moves whatever tensors train, by whatever loss the task has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from peftkit.data.features import Features
from peftkit.errors import InputError
from peftkit.files import append_json_line, write_json_lines
from peftkit.methods.base import Adapted
from peftkit.recipe import Evaluation, Training
from peftkit.record import Loss
from peftkit.tasks.base import Score, Task
from peftkit.train import checkpoint
from peftkit.train.activation_cache import ActivationCache, cache_activations
from peftkit.train.activations import open_offload, set_checkpointing
from peftkit.train.course import Course
from peftkit.train.energy import open_counter
from peftkit.train.fastpath import FastPath
from peftkit.train.gradients import Gradients
from peftkit.train.guards import SETTLED_STEPS, MovementGuard, require_finite
from peftkit.train.meter import Meter, TensorPeak, make_resident
from peftkit.train.optimizers import Updates, learning_rate, open_updates
from peftkit.train.retry import MicroBatch, explained, remedy
from peftkit.train.scoring import computing, mean_loss, predict

AUTO_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens of one forward, padding included, with `micro_batch: auto`."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did, for a progress bar or a log."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    peak_bytes: int
    seconds_left: float


class Observer(Protocol):
    """Whoever watches a run."""

    def on_step(self, report: StepReport) -> None: ...

    def on_validation(self, step: int, loss: float, metrics: dict[str, Score]) -> None: ...

    def say(self, text: str) -> None: ...


class Watch(Protocol):
    """Whoever holds steps against a plan."""

    def during(self, step: int, model: nn.Module, updates: Updates) -> AbstractContextManager[TensorPeak | None]:
        """Around a step, counted from 0."""

    def judge(self, step: int, *, tensor_bytes: int, seconds: float, tokens: int) -> None:
        """After a step: what tensors held at once, 0 where nobody counted; how long it took; its tokens unpadded."""


@dataclass(slots=True)
class LoopState:
    """Where the loop stands; all of it is in a checkpoint.

    Attributes:
        micro_batch: what stands in for the recipe's since memory ran out with that; None while it has not.
    """

    step: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    loss_sum: float = 0.0
    loss_units: int = 0
    best_value: float | None = None
    best_step: int | None = None
    scorings_since_best: int = 0
    stopped: bool = False
    micro_batch: int | str | None = None
    guards: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The outcome of training; the adapted model holds the weights that the recipe keeps."""

    steps: int
    loss: Loss
    meter: Meter
    guards: dict[str, Any]
    history: list[dict[str, Any]]


class Loop:
    """One run's training: `fit` starts or resumes it."""

    def __init__(
        self,
        adapted: Adapted,
        task: Task,
        training: Training,
        evaluation: Evaluation,
        *,
        train: Sequence[Features],
        validation: Sequence[Features] | None,
        fast: FastPath,
        seed: int,
        folder: Path,
        accelerator: Accelerator,
        observer: Observer,
        watch: Watch | None = None,
    ) -> None:
        if accelerator.num_processes > 1:
            raise InputError("this version trains on one device. Start it without `accelerate launch`.")
        self.adapted, self.task, self.training, self.evaluation = adapted, task, training, evaluation
        self.train, self.validation, self.fast, self.seed = train, validation, fast, seed
        self.folder, self.observer, self.accelerator, self.watch = folder, observer, accelerator, watch
        self.selection = self._selection()
        self.trainable = adapted.trainable()
        self.course = Course(training, list(map(len, train)), seed=seed)
        self.device = accelerator.device
        self.updates = open_updates(self.trainable, training, adapted.rounding)
        self.meter = Meter(self.device, open_counter(self.device))
        self.state = LoopState()
        set_checkpointing(adapted.model, training.checkpointing)
        saving = open_offload(adapted.model, self.device) if training.offload_activations else nullcontext()
        self.caches = self._open_caches() if training.activation_cache else (None, None)
        self.gradients = Gradients(
            adapted, task, training, self.updates, fast, accelerator, cache=self.caches[0], saving=saving
        )

    def fit(self, *, resume: bool = False) -> Fitted:
        """Train to the end, from the newest checkpoint when `resume` and there is one.

        Raises:
            Diverged: the loss or the gradient is not a number.
            GuardTripped: what should train does not.
            OutOfMemory: the device, or the machine, has no more memory.
        """
        if resume:
            self._resume()
        make_resident(self.adapted.model)
        guard = MovementGuard(self.trainable) if self.state.step < SETTLED_STEPS else None
        with explained("training", remedy(self.training)):
            while not self._is_over() and not self.state.stopped:
                self._advance(guard)
                if guard is not None and (self.state.step >= SETTLED_STEPS or self._is_over()):
                    self._settle(guard)
                    guard = None
                if self._validation_is_due():
                    self._validate()
                    self.meter.settle()
                if self.state.step % self.training.checkpoint_every == 0 and not self._is_over():
                    self._save()
        return self._finish()

    def _is_over(self) -> bool:
        return self.course.is_over(self.state.step, self.meter.train_seconds)

    def _advance(self, guard: MovementGuard | None) -> None:
        """One optimizer step; its loss is the mean over all loss units of the step, however it is cut."""
        state, given = self.state, self._micro_batch()
        examples = [self.train[position] for position in self.course.examples(state.step)]
        units = sum(example.loss_units for example in examples)
        rate = learning_rate(self.training, state.step, self.course.horizon(state.step, self.meter.train_seconds))
        self.updates.set_rate(rate)
        self.adapted.model.train()
        watched = None if self.watch is None else self.watch.during(state.step, self.adapted.model, self.updates)
        with self.meter.step(watched):
            taken = self.gradients.accumulate(examples, given, where=f"step {state.step + 1}")
            for batch in taken.batches:
                self.meter.count(
                    samples=len(batch.rows),
                    tokens=int(batch.lengths.sum()),
                    padded_tokens=batch.input_ids.numel(),
                    loss_tokens=batch.loss_units,
                )
            norm = self.updates.gradient_norm()
            mean, gradient_norm = float(taken.loss) / units, float(norm)
            require_finite(mean, gradient_norm, state.step + 1)
            if guard is not None:
                guard.see_gradients(self.updates.received())
            with explained(f"the optimizer's update of step {state.step + 1}", "Try training.optimizer=adamw-8bit."):
                self.updates.finish()
        if taken.micro_batch != given:
            self._keep(taken.micro_batch, given)
        if self.watch is not None and state.micro_batch is None:  # the plan is of the recipe's own
            tokens = sum(int(batch.lengths.sum()) for batch in taken.batches)
            seconds = self.meter.step_seconds[-1]
            self.watch.judge(state.step, tensor_bytes=self.meter.tensor_bytes, seconds=seconds, tokens=tokens)
        state.step += 1
        state.first_loss = mean if state.first_loss is None else state.first_loss
        state.last_loss = mean
        state.loss_sum += mean * units
        state.loss_units += units
        self._report(mean, gradient_norm, rate)

    def _open_caches(self) -> tuple[ActivationCache, ActivationCache | None]:
        """Caches of the frozen layers' output: of the training split, and of the one to validate on."""
        splits = [self.train] if self.validation is None else [self.train, self.validation]
        with computing(self.adapted, self.device):
            caches = cache_activations(
                self.adapted.model,
                splits,
                pad_id=self.fast.pad_id,
                max_tokens=AUTO_TOKENS.get(self.device.type, 8192),
                settings=self.training.kernels.model_dump(),
                say=self.observer.say,
            )
        return caches[0], caches[1] if len(caches) > 1 else None

    def _micro_batch(self) -> MicroBatch:
        setting = self.state.micro_batch or self.training.micro_batch
        return MicroBatch.of(setting, auto_tokens=AUTO_TOKENS.get(self.device.type, 8192))

    def _keep(self, smaller: MicroBatch, given: MicroBatch) -> None:
        """Take this step's smaller micro-batch for all that follow, and tell."""
        state, before, now = self.state, given.setting, smaller.setting
        state.micro_batch = now
        state.guards.setdefault("oom_retries", []).append({"step": state.step + 1, "from": before, "to": now})
        self.observer.say(
            f"step {state.step + 1} ran out of memory with training.micro_batch={before!r} and was taken with {now!r}, "
            "which stays; neither the examples of a step nor its loss change"
        )

    def _report(self, loss: float, gradient_norm: float, rate: float) -> None:
        state, recent, spent = self.state, self.meter.step_seconds[-20:], self.meter.train_seconds
        report = StepReport(
            step=state.step,
            total_steps=self.course.expected_steps(state.step, spent),
            epoch=state.step / self.course.steps_per_epoch,
            loss=loss,
            gradient_norm=gradient_norm,
            learning_rate=rate,
            tokens_per_second=self.meter.tokens / spent,
            peak_bytes=self.meter.peak_bytes,
            seconds_left=self.course.seconds_left(state.step, spent, step_seconds=sum(recent) / len(recent)),
        )
        self.observer.on_step(report)
        if state.step % self.training.log_every == 0 or state.step == 1 or self._is_over():
            row = {
                "step": report.step,
                "epoch": round(report.epoch, 4),
                "loss": loss,
                "gradient_norm": gradient_norm,
                "learning_rate": rate,
                "tokens_per_second": round(report.tokens_per_second, 1),
            }
            self._log(row)

    def _log(self, row: dict[str, Any]) -> None:
        append_json_line(self.folder / "log.jsonl", row)
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def _settle(self, guard: MovementGuard) -> None:
        self.state.guards |= guard.judge()
        for key, trouble in (("without_gradient", "received no gradient"), ("unmoved", "did not move")):
            names = self.state.guards[key]
            if names:
                self.observer.say(
                    f"warning: {len(names)} of {len(self.trainable)} trained tensors {trouble} in the first steps, "
                    f"such as {names[0]}"
                )

    def _validation_is_due(self) -> bool:
        every, step = self.evaluation.every, self.state.step
        if self.validation is None or every == "never":
            return False
        return self._is_over() or step % (self.course.steps_per_epoch if every == "epoch" else every) == 0

    def _validate(self) -> None:
        assert self.validation is not None
        state = self.state
        found = predict(
            self.adapted,
            self.task,
            self.validation,
            pad_id=self.fast.pad_id,
            max_tokens=self.evaluation.batch_tokens,
            fast=self.fast,
            cache=self.caches[1],
        )
        loss, metrics = mean_loss(found, self.validation), self.task.metrics(found, intervals=False)
        require_finite(loss, 0.0, state.step)
        values = {"loss": loss} | {name: score.value for name, score in metrics.items()}
        place = {"step": state.step, "epoch": round(state.step / self.course.steps_per_epoch, 4)}
        state.history.append(place | {"train_seconds": self.meter.train_seconds} | values)
        self._log({"step": state.step} | {f"validation_{name}": value for name, value in values.items()})
        self.observer.on_validation(state.step, loss, metrics)
        metric = self.selection
        sign = -1.0 if metric in self.task.lower_is_better else 1.0
        if state.best_value is None or sign * values[metric] > sign * state.best_value:
            state.best_value, state.best_step, state.scorings_since_best = values[metric], state.step, 0
            if self.evaluation.keep == "best":
                checkpoint.save_best(self.folder / "checkpoints", state.step, self.trainable)
        else:
            state.scorings_since_best += 1
            if self.evaluation.patience is not None and state.scorings_since_best >= self.evaluation.patience:
                state.stopped = True
                self.observer.say(f"stopped at step {state.step}: no better {metric} since step {state.best_step}")
        hurdle = self.evaluation.hurdles.get(state.step)
        if hurdle is not None and sign * state.best_value < sign * hurdle and not self._is_over():
            state.stopped = True
            state.guards["missed_hurdle"] = state.step
            self.observer.say(
                f"stopped at step {state.step}: the best {metric} is {state.best_value:.4f}, not {hurdle:.4f}"
            )

    def _selection(self) -> str:
        known = ("loss", *self.task.metric_names)
        metric = self.task.selection_metric if self.evaluation.metric == "auto" else self.evaluation.metric
        if metric not in known:
            raise InputError(f"evaluation.metric: this task has no {metric!r}. It has: {', '.join(known)}.")
        return metric

    def _save(self) -> None:
        state = {"loop": {n: getattr(self.state, n) for n in LoopState.__slots__}, "meter": self.meter.state()}
        checkpoint.save_checkpoint(
            self.folder / "checkpoints", self.state.step, self.trainable, self.updates, json.dumps(state)
        )

    def _resume(self) -> None:
        found = checkpoint.list_checkpoints(self.folder / "checkpoints")
        log = self.folder / "log.jsonl"
        if found:
            state = json.loads(checkpoint.load_checkpoint(found[-1], self.trainable, self.updates))
            self.state = LoopState(**state["loop"])
            self.meter.restore(state["meter"])
            total = self.course.expected_steps(self.state.step, self.meter.train_seconds)
            self.observer.say(f"resumed from step {self.state.step} of {total}")
        if log.exists():
            rows = [_parsed(line) for line in log.read_text(encoding="utf-8").splitlines()]
            write_json_lines(log, [row for row in rows if row is not None and row["step"] <= self.state.step])

    def _finish(self) -> Fitted:
        state = self.state
        kept_best = self.evaluation.keep == "best" and state.best_step not in (None, state.step)
        if kept_best and state.best_step is not None:
            best = checkpoint.best_folder(self.folder / "checkpoints", state.best_step)
            checkpoint.restore_tensors(best, self.trainable)
        scored = next((row for row in state.history if row["step"] == state.best_step), None)
        last = scored if kept_best else (state.history[-1] if state.history else None)
        loss = Loss(
            first=state.first_loss,
            last=state.last_loss,
            mean=state.loss_sum / state.loss_units if state.loss_units else None,
            validation=last["loss"] if last else None,
        )
        guards = state.guards | {"best_step": state.best_step, "stopped_early": state.stopped, "steps": state.step}
        if state.history:
            guards["metric"] = self.selection
        return Fitted(state.step, loss, self.meter, guards, state.history)


def _parsed(line: str) -> dict[str, Any] | None:
    """A row of the log; None for a line that a crash tore."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
