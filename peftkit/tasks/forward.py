"""One forward over a batch, whichever way its examples lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkit.data.batching import Batch
from peftkit.kernels.packed import run_packed


def logits_of(model: Any, batch: Batch) -> Tensor:
    """The model's logits: for tokens [B, P + T, ...] or packed [1, N + B P, ...], for pooled examples [B, ...]."""
    if batch.segments is None:
        padded: Tensor = model(**batch.inputs()).logits
        return padded
    return run_packed(model, batch.input_ids, batch.segments, token_type_ids=batch.token_type_ids)
