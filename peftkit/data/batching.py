"""Examples -> optimizer steps -> forwards: end to end without padding, or padded with others of like lengths.

Which examples an optimizer step sees depends on the recipe alone (seed, epoch, batch size); how a step is cut into
forwards depends on the budget, and never changes the step's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peftkit.data.features import IGNORED, Features
from peftkit.kernels.segments import Segments

FORWARD_OVERHEAD_TOKENS = 128
"""What one more forward costs, in padded tokens: a step is cut where it saves more padding than that."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward's worth of examples, right-padded or packed. B examples, T the longest, N tokens in all.

    Attributes:
        input_ids: [B, T]; packed: [1, N], the examples end to end.
        attention_mask: [B, T] of 0 and 1, or None when nothing is padded.
        token_type_ids: shaped as `input_ids`, or None.
        target: token ids shaped as `input_ids` with `IGNORED` (token tasks), or [B] / [B, num_labels] (sequence tasks).
        lengths: [B] tokens of each example without padding.
        loss_units: the sum of the examples' loss units.
        rows: the examples' indices in their table.
        segments: packed: where each example lies; None when padded.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    target: Tensor
    lengths: Tensor
    loss_units: int
    rows: tuple[int, ...]
    segments: Segments | None = None

    @property
    def cu_lengths(self) -> Tensor | None:
        """[B + 1] where each packed example starts, and the end; None when padded."""
        return None if self.segments is None else self.segments.bounds

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward."""
        named = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": self.token_type_ids,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; the host does not wait for the copy."""

        def moved(tensor: Tensor) -> Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            attention_mask=None if self.attention_mask is None else moved(self.attention_mask),
            token_type_ids=None if self.token_type_ids is None else moved(self.token_type_ids),
            target=moved(self.target),
            lengths=moved(self.lengths),
            segments=None if self.segments is None else self.segments.to(device),
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


def pack(features: Sequence[Features]) -> Batch:
    """Lay examples end to end. No example's first token is a target: nothing of its own comes before it."""
    segments = Segments.of([len(feature) for feature in features])

    def joined(arrays: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64))[None]

    types = [feature.token_type_ids for feature in features]
    target = _targets(features, lambda arrays, fill: joined(arrays))
    if _has_token_targets(features):
        target[0, segments.starts()] = IGNORED
    return Batch(
        input_ids=joined([feature.input_ids for feature in features]),
        attention_mask=None,
        token_type_ids=joined([t for t in types if t is not None]) if all(t is not None for t in types) else None,
        target=target,
        lengths=torch.tensor(segments.lengths),
        loss_units=sum(feature.loss_units for feature in features),
        rows=tuple(feature.row for feature in features),
        segments=segments,
    )


def _has_token_targets(features: Sequence[Features]) -> bool:
    first = features[0].target
    return isinstance(first, np.ndarray) and first.dtype == np.int32


def _targets(
    features: Sequence[Features], laid_out: Callable[[Sequence[npt.NDArray[np.int32]], int], Tensor]
) -> Tensor:
    if _has_token_targets(features):
        return laid_out([np.asarray(feature.target) for feature in features], IGNORED)
    return torch.from_numpy(np.array([feature.target for feature in features]))


def step_order(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
    """The examples of each optimizer step of one epoch: a seeded permutation, cut every `batch_size`."""
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    return [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]


def packs(
    features: Sequence[Features], *, max_examples: int | None = None, max_tokens: int | None = None
) -> Iterator[list[Features]]:
    """Cut one step into forwards without padding: few, of about the same size, neighbours alike in length.

    Args:
        max_examples: most examples of one forward.
        max_tokens: most tokens of one forward; an example longer than that goes alone.
    """
    total = sum(len(feature) for feature in features)
    budget = max_tokens or total
    share = total / math.ceil(total / budget)
    group: list[Features] = []
    size = 0
    for feature in sorted(features, key=lambda feature: (-len(feature), feature.row)):
        if group and (size >= share or size + len(feature) > budget or len(group) == max_examples):
            yield group
            group, size = [], 0
        group.append(feature)
        size += len(feature)
    yield group


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
