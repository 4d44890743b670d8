"""Optimizer steps as the training loop takes them, stripped of what watches them; tensors fake or real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from peftkit.backbones.load import Backbone
from peftkit.backbones.spec import Head
from peftkit.data.batching import Batch
from peftkit.data.features import IGNORED, Features
from peftkit.errors import InputError
from peftkit.kernels.loss import HeadRule
from peftkit.methods.base import Adapted
from peftkit.plan.kinds import tag_gradients, tag_state, tag_weights
from peftkit.plan.on_card import offloading
from peftkit.plan.sizes import Size
from peftkit.plan.storages import StorageTracker
from peftkit.recipe import Recipe, Training
from peftkit.tasks import open_task
from peftkit.tasks.base import Task
from peftkit.train.activations import OFFLOADED_BYTES, set_checkpointing
from peftkit.train.checkpoint import tensors_to_write
from peftkit.train.fastpath import FastPath
from peftkit.train.frozen_layers import answering, lowest_trainable_block, repeated_blocks
from peftkit.train.loop import AUTO_TOKENS
from peftkit.train.optimizers import Updates, open_updates
from peftkit.train.scoring import computing


def run_steps(
    recipe: Recipe,
    backbone: Backbone,
    head: Head,
    tracker: StorageTracker,
    *,
    steps: Sequence[Sequence[Size]],
    device: Literal["cuda", "cpu"],
) -> Steps:
    """Optimizer steps as the training loop takes them, a forward of the evaluation, and what saving gathers.

    Tensors are fake or real, and what is left of them lives as long as what is returned.

    Args:
        tracker: is in place.
        steps: the examples of each step; the optimizer's state is there from the second on.
    """
    training = recipe.training
    adapted = recipe.method.attach(backbone)
    fast = FastPath.open(
        adapted.model, training.kernels, attention=recipe.backbone.attention, pad_id=0, say=lambda text: None
    )
    fast.check_recomputing(recipe)
    set_checkpointing(adapted.model, training.checkpointing)
    loop = Steps(
        training,
        adapted,
        open_task(recipe.task, head),
        fast,
        open_updates(adapted.trainable(), training, adapted.rounding),
        tracker,
        saving=offloading(adapted.model, smallest_bytes=OFFLOADED_BYTES)
        if training.offload_activations
        else nullcontext(),
        skipped=_frozen_layers(adapted.model) if training.activation_cache else [],
        hidden=backbone.dims.hidden,
        dtype=backbone.compute_dtype,
        device=device,
    )
    tag_weights(tracker, adapted.model, adapted=adapted.artifact == "adapter")
    tracker.watch(adapted.model)
    adapted.model.train()
    with _naming_loss(tracker):
        for number, sizes in enumerate(steps, start=1):
            loop.advance(_examples(sizes, head), "" if number == len(steps) else "*")
    if recipe.evaluation.every != "never":
        adapted.model.eval()
        longest, limit = max(steps[-1]), recipe.evaluation.batch_tokens
        loop.score(_examples([longest] * max(1, limit // longest.tokens), head), limit)
    loop.save()
    return loop


@dataclass(frozen=True, slots=True)
class Steps:
    """What `Loop` and `Gradients` do in a step, without what watches it.

    Attributes:
        saving: where activations wait for the backward pass.
        skipped: layers that the activation cache answers for, with states [..., hidden] of `dtype`.
    """

    training: Training
    adapted: Adapted
    task: Task
    fast: FastPath
    updates: Updates
    tracker: StorageTracker
    saving: AbstractContextManager[object]
    skipped: list[nn.Module]
    hidden: int
    dtype: torch.dtype
    device: Literal["cuda", "cpu"]

    def advance(self, features: list[Features], suffix: str) -> None:
        """One optimizer step; the suffix goes behind the names of its phases."""
        tracker, updates = self.tracker, self.updates
        units = sum(example.loss_units for example in features)
        tracker.enter("forward" + suffix)
        total = torch.zeros(())
        batches = list(self._batches(features))
        for number, batch in enumerate(batches, start=1):
            if number == len(batches):
                updates.begin_last_micro_batch()
            tracker.enter("forward" + suffix)
            with self.fast.active():
                summed = self._loss(batch.to(torch.device("cpu")))
                tracker.enter("backward" + suffix)
                (summed / units).backward()  # type: ignore[no-untyped-call]
            total += summed.detach()
            del summed
        tag_gradients(tracker, self.adapted.model)
        tracker.enter("optimizer" + suffix)
        updates.gradient_norm()
        updates.finish()
        tag_state(tracker, updates.state_dict())

    @torch.no_grad()
    def score(self, features: list[Features], max_tokens: int) -> None:
        """One forward of the evaluation, which finds the optimizer's state in memory and no gradient."""
        self.tracker.enter("evaluation")
        (batch,) = self.fast.batches(features, max_tokens=max_tokens)
        with computing(self.adapted, torch.device("cpu")), self.fast.active(), self._kept(batch):
            self.task.measure(self.adapted.model, batch)

    def save(self) -> None:
        """What is gathered for a checkpoint and for the adapter's file, and nothing of it written."""
        self.tracker.enter("save")
        with torch.no_grad():
            tensors_to_write(self.adapted.trainable())
            self.updates.state_dict()
            if self.adapted.artifact == "adapter":
                from peft import get_peft_model_state_dict

                model = self.adapted.model
                held = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
                held.update(model.named_buffers(remove_duplicate=False))
                get_peft_model_state_dict(model, held, save_embedding_layers=False)

    def _loss(self, batch: Batch) -> Tensor:
        kept = self._kept(batch)
        with computing(self.adapted, torch.device("cpu")), kept, self.saving:
            return self.task.loss(
                self.adapted.model, batch, smoothing=self.training.label_smoothing, fused=self.fast.fused_loss
            )

    def _kept(self, batch: Batch) -> AbstractContextManager[None]:
        """The activation cache's part of a forward."""
        if not self.skipped:
            return nullcontext()
        return answering(self.skipped, torch.zeros((*batch.input_ids.shape, self.hidden), dtype=self.dtype))

    def _batches(self, features: list[Features]) -> Iterator[Batch]:
        """How the loop cuts a step."""
        match self.training.micro_batch:
            case "auto":
                return self.fast.batches(features, max_tokens=AUTO_TOKENS.get(self.device, 8192))
            case int(count):
                return self.fast.batches(features, max_examples=count)
            case budget:
                return self.fast.batches(features, max_tokens=int(budget.split()[0]))


def _frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The layers below the first that trains.

    Raises:
        InputError: there are none.
    """
    blocks = repeated_blocks(model)
    index = 0 if blocks is None else lowest_trainable_block(blocks)
    if blocks is None or index == 0:
        raise InputError(
            "training.activation_cache: there is no frozen layer below the first that trains. "
            "Set method.layers=top-N, or training.activation_cache=false."
        )
    return list(blocks)[:index]


@contextmanager
def _naming_loss(tracker: StorageTracker) -> Iterator[None]:
    """Output layer and loss in one are a phase of their own; computed apart, they are a part of the forward pass."""
    own = HeadRule.loss

    def loss(rule: HeadRule, hidden_NH: Tensor, target_N: Tensor, *, smoothing: float = 0.0) -> Tensor:
        tracker.enter("loss*" if tracker.phase.endswith("*") else "loss")
        return own(rule, hidden_NH, target_N, smoothing=smoothing)

    with patch.object(HeadRule, "loss", loss):
        yield


def _examples(sizes: Sequence[Size], head: Head) -> list[Features]:
    return [_example(size, head, row) for row, size in enumerate(sizes)]


def _example(size: Size, head: Head, row: int) -> Features:
    """An example of this size; what carries loss is at its end."""
    tokens = np.ones(size.tokens, dtype=np.int32)
    if head.kind == "language":
        target = tokens.copy()
        target[: size.tokens - size.labelled] = IGNORED
        return Features(tokens, target, size.labelled, row)
    if head.problem == "multi_label_classification":
        return Features(tokens, np.zeros(head.num_outputs, dtype=np.float32), 1, row)
    return Features(tokens, 0.0 if head.problem == "regression" else 0, 1, row)
