"""Run a model over a split without training it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from peftkit.data.features import Features
from peftkit.methods.base import Adapted
from peftkit.tasks.base import Prediction, Task
from peftkit.train.activation_cache import ActivationCache, replaying
from peftkit.train.fastpath import FastPath

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
        fast: as the run trained; None takes the model's own plain path.
        cache: of the split's frozen layers; None runs them.
    """
    fast = fast or FastPath(pad_id=pad_id)
    model = adapted.model.eval()
    device = next(model.parameters()).device
    ordered = sorted(features, key=lambda feature: (len(feature), feature.row))
    found: list[Prediction] = []
    for start in range(0, len(ordered), WINDOW):
        for batch in fast.batches(ordered[start : start + WINDOW], max_tokens=max_tokens):
            with computing(adapted, device), fast.active(), replaying(cache, batch):
                found += task.predict(model, batch.to(device))
    return sorted(found, key=lambda prediction: prediction["row"])


def mean_loss(predictions: Sequence[Prediction], features: Sequence[Features]) -> float:
    """Mean loss over loss units, in nats."""
    return float(sum(p["loss"] for p in predictions)) / sum(feature.loss_units for feature in features)


def computing(adapted: Adapted, device: torch.device) -> AbstractContextManager[object]:
    """Autocast where the method holds weights wider than it computes in."""
    if adapted.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=adapted.autocast)
