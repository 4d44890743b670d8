"""One optimizer step's gradient, from the forwards that the step is cut into: smaller ones where memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from peftkit.data.batching import Batch
from peftkit.data.features import Features
from peftkit.errors import OutOfMemory
from peftkit.methods.base import Adapted
from peftkit.recipe import Training
from peftkit.tasks.base import Task
from peftkit.train.activation_cache import ActivationCache, replaying
from peftkit.train.checkpoint import random_states, restore_random_states
from peftkit.train.fastpath import FastPath
from peftkit.train.optimizers import Updates
from peftkit.train.retry import Exhausted, MicroBatch, attempt, remedy
from peftkit.train.scoring import computing


@dataclass(frozen=True, slots=True)
class Accumulated:
    """A step whose gradients are in place: its summed loss, the forwards it took, and the most that one could take."""

    loss: Tensor
    batches: Sequence[Batch]
    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Gradients:
    """Where a run's gradients come from.

    Attributes:
        cache: of the frozen layers over the split that is trained on; None runs them.
        saving: where activations wait for the backward pass, entered for every forward.
    """

    adapted: Adapted
    task: Task
    training: Training
    updates: Updates
    fast: FastPath
    accelerator: Accelerator
    cache: ActivationCache | None
    saving: AbstractContextManager[object]

    def accumulate(self, examples: Sequence[Features], micro_batch: MicroBatch, *, where: str) -> Accumulated:
        """Add the gradient of the examples' mean loss over all their units to the parameters', however it is cut.

        Args:
            where: which step this is, in words.

        Raises:
            OutOfMemory: not even one example a forward fits, or a part of the update was applied when memory ran out.
        """
        states, units = random_states(), sum(example.loss_units for example in examples)
        batches = micro_batch.cut(self.fast, examples)
        while isinstance(loss := attempt(partial(self._pass, batches, units)), Exhausted):
            micro_batch = self._smaller(micro_batch, batches, loss, where=where)
            clear_device_cache(garbage_collection=True)
            restore_random_states(states)
            batches = micro_batch.cut(self.fast, examples)
        return Accumulated(loss, batches, micro_batch)

    def _pass(self, batches: Sequence[Batch], units: int) -> Tensor:
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, start=1):
            if number == len(batches):
                self.updates.begin_last_micro_batch()
            total += self._backward(batch.to(self.accelerator.device), units)
        return total

    def _backward(self, batch: Batch, units: int) -> Tensor:
        """The batch's summed loss; its gradient, as a part of the step's mean, is added to the parameters'."""
        with self.fast.active():
            with computing(self.adapted, self.accelerator.device), replaying(self.cache, batch), self.saving:
                loss = self.task.loss(
                    self.adapted.model, batch, smoothing=self.training.label_smoothing, fused=self.fast.fused_loss
                )
            self.accelerator.backward(loss / units)
        return loss.detach()

    def _smaller(
        self, micro_batch: MicroBatch, batches: Sequence[Batch], fault: Exhausted, *, where: str
    ) -> MicroBatch:
        """What to try next, once the gradients of the failed attempt are thrown away."""
        smaller = micro_batch.halved(batches, fault, where=where, remedy=remedy(self.training))
        if self.updates.abandon():
            return smaller
        raise OutOfMemory(
            f"{where} cannot be tried again, because training.optimizer_in_backward applied a part of its update: "
            f"{fault.reason}. Start again with training.micro_batch={smaller.setting!r}."
        )
