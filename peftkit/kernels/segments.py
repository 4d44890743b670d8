"""Where each example lies among the tokens of a packed batch, and which examples attention treats together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

LIKE_LENGTHS = 0.75
"""Examples share a group down to this fraction of the longest one's length: less padding against fewer calls."""
LARGEST = 2**19
"""Most scores (examples x longest x longest) of a group and a head: more of them fall out of the processor's cache."""


@dataclass(frozen=True, slots=True)
class Group:
    """Examples of like lengths, neighbours in the packed batch, padded to the longest for attention alone.

    Attributes:
        start, stop: the packed rows.
        examples: B.
        longest: T.
        source: [B T] the packed row, counted from `start`, that each padded row is filled from; None without padding.
        kept: [stop - start] the padded rows that hold real tokens; None without padding.
        real_BT: [B, T] whether a padded row holds a real token.
    """

    start: int
    stop: int
    examples: int
    longest: int
    source: Tensor | None
    kept: Tensor | None
    real_BT: Tensor

    def spread(self, rows: Tensor) -> Tensor:
        """The group's rows of a packed tensor [N, ...], padded with copies of its last row: [B T, ...]."""
        own = rows[self.start : self.stop]
        return own if self.source is None else own.index_select(0, self.source)

    def spread_gradient(self, rows: Tensor) -> Tensor:
        """As `spread`, with zeros in the padding."""
        if self.source is None:
            return self.spread(rows)
        return self.spread(rows) * self.real_BT.view(-1, *[1] * (rows.ndim - 1))

    def collect(self, padded: Tensor) -> Tensor:
        """The real rows of [B T, ...]."""
        return padded if self.kept is None else padded.index_select(0, self.kept)

    def to(self, device: torch.device) -> Group:
        """The same group with its tensors on another device."""
        source, kept = (None if x is None else x.to(device) for x in (self.source, self.kept))
        return replace(self, source=source, kept=kept, real_BT=self.real_BT.to(device))


@dataclass(frozen=True, slots=True)
class Segments:
    """The examples of a packed batch, in order.

    Attributes:
        lengths: tokens of each.
        bounds: [examples + 1], int32: where each starts, and the end.
        groups: all examples, in order.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Segments of these lengths; longest first makes the fewest groups."""
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(tuple(lengths), torch.from_numpy(bounds), tuple(_groups(list(lengths), bounds.tolist())))

    def starts(self) -> Tensor:
        """[examples]: the first row of each."""
        return self.bounds[:-1].long()

    def ends(self) -> Tensor:
        """[examples]: the last row of each."""
        return self.bounds[1:].long() - 1

    def positions(self, *, first: int = 0) -> Tensor:
        """[1, N]: each token's position in its own example, counted from `first`."""
        ranges = [np.arange(first, first + length) for length in self.lengths]
        return torch.from_numpy(np.concatenate(ranges))[None].to(self.bounds.device)

    def split(self, groups: int) -> tuple[Segments, Segments]:
        """The examples of so many groups from the first on, and the others, each counted from its own first row."""
        row, count = self.groups[groups].start, sum(group.examples for group in self.groups[:groups])
        moved = (replace(group, start=group.start - row, stop=group.stop - row) for group in self.groups[groups:])
        first = Segments(self.lengths[:count], self.bounds[: count + 1], self.groups[:groups])
        return first, Segments(self.lengths[count:], self.bounds[count:] - row, tuple(moved))

    def to(self, device: torch.device) -> Segments:
        """The same segments with their tensors on another device."""
        return Segments(self.lengths, self.bounds.to(device), tuple(group.to(device) for group in self.groups))


def _groups(lengths: list[int], bounds: list[int]) -> list[Group]:
    groups, first = [], 0
    while first < len(lengths):
        last = first + 1
        longest = shortest = lengths[first]
        while last < len(lengths):
            longest, shortest = max(longest, lengths[last]), min(shortest, lengths[last])
            if shortest < LIKE_LENGTHS * longest or (last + 1 - first) * longest**2 > LARGEST:
                break
            last += 1
        groups.append(_group(lengths[first:last], bounds[first], bounds[last]))
        first = last
    return groups


def _group(lengths: list[int], start: int, stop: int) -> Group:
    longest = max(lengths)
    real_BT = np.arange(longest) < np.array(lengths)[:, None]
    if real_BT.all():
        return Group(start, stop, len(lengths), longest, None, None, torch.from_numpy(real_BT))
    source = np.full(real_BT.shape, stop - start - 1)
    source[real_BT] = np.arange(stop - start)
    kept = np.flatnonzero(real_BT)
    tensors = (torch.from_numpy(array.copy()) for array in (source.ravel(), kept, real_BT))
    return Group(start, stop, len(lengths), longest, *tensors)
