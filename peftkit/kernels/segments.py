"""Where each example lies among the tokens of a packed batch, and which examples attention treats together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

LIKE_LENGTHS = 0.5
"""Examples share a group down to this fraction of the longest one's length: less padding against fewer calls."""
LARGEST = 2**18
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
        padding: the padded rows that hold none; None without padding.
        real_BT: [B, T] whether a padded row holds a real token.
    """

    start: int
    stop: int
    examples: int
    longest: int
    source: Tensor | None
    kept: Tensor | None
    padding: Tensor | None
    real_BT: Tensor

    def to(self, device: torch.device) -> Group:
        """The same group with its tensors on another device."""
        indices = (self.source, self.kept, self.padding)
        source, kept, padding = (None if index is None else index.to(device) for index in indices)
        return replace(self, source=source, kept=kept, padding=padding, real_BT=self.real_BT.to(device))


@dataclass(frozen=True, slots=True)
class Blocks:
    """States [1, A, N, D] of tokens, and the same as rows [M, D]: padded, by group, example, head and token.

    With P virtual tokens in front of every example a group of B examples has B A S rows, where S = P + T.

    Attributes:
        source: [M] the row of [N A, D] that each row is filled from; those past the end are virtual tokens'.
        kept: [N A] the rows that hold real tokens, token by token.
        padding: the rows that hold none; None without padding.
        shapes: (B, A, S) of each group.
        virtual: P.
    """

    source: Tensor
    kept: Tensor
    padding: Tensor | None
    shapes: tuple[tuple[int, int, int], ...]
    virtual: int

    def gather(self, states: Tensor, front: Tensor | None = None) -> Tensor:
        """The rows of [1, A, N, D] and of what is in front of every example, [1, A, P, D]; padding holds anything."""
        rows = states[0].transpose(0, 1).reshape(-1, states.shape[-1])
        if front is not None:
            rows = torch.cat([rows, front.to(rows.dtype).reshape(-1, rows.shape[-1])])
        return rows.index_select(0, self.source)

    def gather_gradient(self, states: Tensor) -> Tensor:
        """As `gather`, with zeros in the padding."""
        rows = self.gather(states)
        return rows if self.padding is None else rows.index_fill_(0, self.padding, 0)

    def collect(self, rows: Tensor) -> Tensor:
        """Those of real tokens, [N, A, D]."""
        return rows.index_select(0, self.kept).view(-1, self.shapes[0][1], rows.shape[-1])

    def collect_front(self, rows: Tensor) -> Tensor:
        """The sum over the examples of those of virtual tokens, [1, A, P, D]."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        groups = (view.view(*shape, -1) for view, shape in zip(self.views(rows), self.shapes, strict=True))
        return torch.stack([group[:, :, : self.virtual].sum(0, dtype=wide) for group in groups]).sum(0, keepdim=True)

    def views(self, rows: Tensor, heads: int | None = None) -> list[Tensor]:
        """Each group's rows as [B A, S, D], or as [B heads, A S / heads, D]."""
        found = torch.split(rows, [examples * own * size for examples, own, size in self.shapes])
        return [
            view.view(examples * (heads or own), -1, rows.shape[-1])
            for view, (examples, own, _) in zip(found, self.shapes, strict=True)
        ]


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
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Segments of these lengths; longest first makes the fewest groups."""
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(tuple(lengths), torch.from_numpy(bounds), tuple(_groups(list(lengths), bounds.tolist())))

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, once for all layers of a forward pass."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def blocks(self, heads: int, *, virtual: int = 0) -> Blocks:
        """The blocks of so many heads, with so many virtual tokens in front of each example."""
        found: Blocks = self.memo(("blocks", heads, virtual), lambda: _blocks(self, heads, virtual))
        return found

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
        found: tuple[Segments, Segments] = self.memo(("split", groups), lambda: self._split(groups))
        return found

    def _split(self, groups: int) -> tuple[Segments, Segments]:
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
        return Group(start, stop, len(lengths), longest, None, None, None, torch.from_numpy(real_BT))
    source = np.full(real_BT.shape, stop - start - 1)
    source[real_BT] = np.arange(stop - start)
    arrays = (source.ravel(), np.flatnonzero(real_BT), np.flatnonzero(~real_BT), real_BT)
    tensors = (torch.from_numpy(array.copy()) for array in arrays)
    return Group(start, stop, len(lengths), longest, *tensors)


def _blocks(segments: Segments, heads: int, virtual: int) -> Blocks:
    device, tokens = segments.bounds.device, sum(segments.lengths)
    sources, kept, padding, shapes, first = [], [], [], [], 0
    head_A = torch.arange(heads, device=device)
    front_AP = tokens * heads + torch.arange(heads * virtual, device=device).view(heads, virtual)
    for group in segments.groups:
        examples, longest, size = group.examples, group.longest, virtual + group.longest
        rows = torch.arange(examples * longest, device=device) if group.source is None else group.source
        own_BAT = (group.start + rows).view(examples, 1, longest) * heads + head_A.view(1, heads, 1)
        sources.append(torch.cat([front_AP.expand(examples, heads, virtual), own_BAT], 2).flatten())
        example_B11 = first + size * heads * torch.arange(examples, device=device).view(-1, 1, 1)
        token_T1 = virtual + torch.arange(longest, device=device).view(-1, 1)
        at_XA = (example_B11 + token_T1 + size * head_A).view(-1, heads)
        kept.append(at_XA if group.kept is None else at_XA.index_select(0, group.kept))
        padding += [] if group.padding is None else [at_XA.index_select(0, group.padding).flatten()]
        shapes.append((examples, heads, size))
        first += examples * heads * size
    empty = torch.cat(padding) if padding else None
    return Blocks(torch.cat(sources), torch.cat(kept).flatten(), empty, tuple(shapes), virtual)
