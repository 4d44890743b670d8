"""Examples -> optimizer steps -> micro-batches of like lengths.

Which examples an optimizer step sees depends on the recipe alone (seed, epoch, batch size); how a step is cut into
forwards depends on the budget, and never changes the step's loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peftkit.data.features import IGNORED, Features

FORWARD_OVERHEAD_TOKENS = 128
"""What one more forward costs, in padded tokens: a step is cut where it saves more padding than that."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward's worth of examples, right-padded. B examples, T the longest.

    Attributes:
        input_ids: [B, T].
        attention_mask: [B, T] of 0 and 1, or None when nothing is padded.
        token_type_ids: [B, T] or None.
        target: [B, T] token ids with `IGNORED` (token tasks), or [B] / [B, num_labels] (sequence tasks).
        lengths: [B] tokens of each example without padding.
        loss_units: the sum of the examples' loss units.
        rows: the examples' indices in their table.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    target: Tensor
    lengths: Tensor
    loss_units: int
    rows: tuple[int, ...]

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward."""
        named = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": self.token_type_ids,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            self.input_ids.to(device, non_blocking=True),
            moved(self.attention_mask),
            moved(self.token_type_ids),
            self.target.to(device, non_blocking=True),
            self.lengths.to(device, non_blocking=True),
            self.loss_units,
            self.rows,
        )


def collate(features: Sequence[Features], pad_id: int) -> Batch:
    """Right-pad examples to the longest of them."""
    lengths = np.array([len(feature) for feature in features])
    shape = (len(features), int(lengths.max()))
    real = np.arange(shape[1]) < lengths[:, None]

    def padded(arrays: Sequence[npt.NDArray[np.int32]], fill: int) -> Tensor:
        block = np.full(shape, fill, dtype=np.int64)
        block[real] = np.concatenate(arrays)
        return torch.from_numpy(block)

    types = [feature.token_type_ids for feature in features]
    return Batch(
        input_ids=padded([feature.input_ids for feature in features], pad_id),
        attention_mask=None if real.all() else torch.from_numpy(real.astype(np.int64)),
        token_type_ids=padded([t for t in types if t is not None], 0) if all(t is not None for t in types) else None,
        target=_targets(features, padded),
        lengths=torch.from_numpy(lengths),
        loss_units=sum(feature.loss_units for feature in features),
        rows=tuple(feature.row for feature in features),
    )


def _targets(features: Sequence[Features], padded: object) -> Tensor:
    first = features[0].target
    if isinstance(first, np.ndarray) and first.dtype == np.int32:
        return padded([feature.target for feature in features], IGNORED)  # type: ignore[operator,no-any-return]
    return torch.from_numpy(np.array([feature.target for feature in features]))


def step_order(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
    """The examples of each optimizer step of one epoch: a seeded permutation, cut every `batch_size`."""
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    return [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]


def micro_batches(
    features: Sequence[Features], *, max_examples: int | None = None, max_tokens: int | None = None
) -> Iterator[list[Features]]:
    """Cut one step into forwards of like lengths, where that costs least: padded tokens, and each forward's overhead.

    Args:
        max_examples: most examples of one forward.
        max_tokens: most padded tokens of one forward; an example longer than that goes alone.
    """
    ordered = sorted(features, key=lambda feature: (-len(feature), feature.row))
    lengths = [len(feature) for feature in ordered]
    count = len(ordered)
    best = [0.0] + [float("inf")] * count
    cut = [0] * (count + 1)
    for start in range(count):
        for stop in range(start + 1, count + 1):
            size = (stop - start) * lengths[start]
            if stop > start + 1 and (
                (max_examples and stop - start > max_examples) or (max_tokens and size > max_tokens)
            ):
                break
            cost = best[start] + size + FORWARD_OVERHEAD_TOKENS
            if cost < best[stop]:
                best[stop], cut[stop] = cost, start
    bounds = [count]
    while bounds[-1]:
        bounds.append(cut[bounds[-1]])
    bounds.reverse()
    for start, stop in pairwise(bounds):
        yield ordered[start:stop]
