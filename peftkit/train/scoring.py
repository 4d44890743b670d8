"""Run a model over a split without training it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from accelerate.utils.memory import clear_device_cache

from peftkit.data.batching import Batch
from peftkit.data.features import Features
from peftkit.methods.base import Adapted
from peftkit.tasks.base import Prediction, Task
from peftkit.train.activation_cache import ActivationCache, replaying
from peftkit.train.fastpath import FastPath
from peftkit.train.retry import Exhausted, MicroBatch, attempt

WINDOW = 256
"""Examples cut into forwards at a time, of like lengths because the split is sorted first."""


@torch.no_grad()
def predict(
    adapted: Adapted,
    task: Task,
    features: Sequence[Features],
    *,
    pad_id: int,
    max_tokens: int,
    fast: FastPath | None = None,
    cache: ActivationCache | None = None,
) -> list[Prediction]:
    """One prediction an example, in the order of their rows. The model is left in evaluation mode.

    Args:
        max_tokens: of one forward, padding included; it is halved as often as memory runs out.
        fast: as the run trained; None takes the model's own plain path.
        cache: of the split's frozen layers; None runs them.

    Raises:
        OutOfMemory: one example alone does not fit.
    """
    fast = fast or FastPath(pad_id=pad_id)
    adapted.model.eval()
    ordered = sorted(features, key=lambda feature: (len(feature), feature.row))
    micro_batch, found = MicroBatch(max_tokens, "tokens"), list[Prediction]()
    for start in range(0, len(ordered), WINDOW):
        batches = micro_batch.cut(fast, ordered[start : start + WINDOW])
        while isinstance(scored := attempt(partial(_forward_all, adapted, task, batches, fast, cache)), Exhausted):
            clear_device_cache(garbage_collection=True)
            micro_batch = micro_batch.halved(batches, scored, where="scoring", remedy="Try a smaller backbone.")
            batches = micro_batch.cut(fast, ordered[start : start + WINDOW])
        found += scored
    return sorted(found, key=lambda prediction: prediction["row"])


def _forward_all(
    adapted: Adapted, task: Task, batches: Sequence[Batch], fast: FastPath, cache: ActivationCache | None
) -> list[Prediction]:
    device = next(adapted.model.parameters()).device
    found: list[Prediction] = []
    for batch in batches:
        with computing(adapted, device), fast.active(), replaying(cache, batch):
            found += task.predict(adapted.model, batch.to(device))
    return found


def mean_loss(predictions: Sequence[Prediction], features: Sequence[Features]) -> float:
    """Mean loss over loss units, in nats."""
    return float(sum(p["loss"] for p in predictions)) / sum(feature.loss_units for feature in features)


def computing(adapted: Adapted, device: torch.device) -> AbstractContextManager[object]:
    """Autocast where the method holds weights wider than it computes in."""
    if adapted.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=adapted.autocast)
