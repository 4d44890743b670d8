"""Where the stream of a deeper model has more than a shallower one's: the same block, once for each layer more."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peftkit.plan.storages import Stream, Work

GROWTH = 2
"""Repetitions that the deeper model has more; that their blocks are equal is the proof that they repeat."""
WINDOW = 2
"""Items behind a block that have to agree before it is taken for what was inserted."""
NUMBER = re.compile(r"\d+")


class Irregular(Exception):
    """The streams do not differ by blocks that repeat."""


@dataclass(slots=True)
class Item:
    """A birth, a death, the begin of a phase or an emptied cache, with the work that follows it.

    Attributes:
        label: what it is, but for numbers.
        num_bytes, last: of a birth.
        flops, moved_bytes: of the work.
        indices: numbers in the path of a birth's module.
        born: position of the birth that a death ends.
    """

    label: tuple[str | None, ...]
    num_bytes: int = 0
    last: int = 0
    flops: int = 0
    moved_bytes: int = 0
    indices: tuple[int, ...] = ()
    born: int | None = None

    @property
    def amounts(self) -> tuple[int, int, int, int]:
        """Every number that may grow with the depth."""
        return self.num_bytes, self.last, self.flops, self.moved_bytes


@dataclass(frozen=True, slots=True)
class Insertion:
    """A block that the deeper stream has `GROWTH` times and the shallower one not at all.

    Attributes:
        at: items of the shallower stream before it.
        start: items of the deeper stream before it.
        size: items of the block.
        slack: the items around the place, half of them before it, in which the block could be just as well.
    """

    at: int
    start: int
    size: int
    slack: int = 0

    def share(self, part: int, parts: int) -> Insertion:
        """The block in the middle of one part of where it could be."""
        moved = math.ceil(self.slack * (2 * part + 1) / (2 * parts)) - math.ceil(self.slack / 2)
        return replace(self, at=self.at + moved, start=self.start + moved, slack=self.slack // parts)


def read_items(stream: Stream) -> list[Item]:
    """All that happened, in order. The first item is the begin, to hold the work before anything else."""
    items, births = [Item(("begin",))], dict[int, int]()
    work = {(found.events, found.phases): found for found in stream.work}
    begun = 0
    for index in range(len(stream.events) + 1):
        _attach(items[-1], work.get((index, begun)))
        while begun < len(stream.phases) and stream.phases[begun][0] == index:
            items.append(Item(("phase", stream.phases[begun][1])))
            begun += 1
            _attach(items[-1], work.get((index, begun)))
        if index in stream.emptied:
            items.append(Item(("emptied",)))
        if index == len(stream.events):
            break
        event = stream.events[index]
        if event.num_bytes:
            births[event.tensor] = len(items)
            birth = stream.births[event.tensor]
            module = NUMBER.sub("#", birth.module)
            indices = tuple(map(int, NUMBER.findall(birth.module)))
            label = ("birth", birth.phase, module, birth.operator, birth.kind)
            items.append(Item(label, birth.num_bytes, birth.last, indices=indices))
        else:
            items.append(Item(("death",), born=births[event.tensor]))
    return items


def _attach(item: Item, work: Work | None) -> None:
    if work is not None:
        item.flops, item.moved_bytes = work.flops, work.moved_bytes


def signs(streams: Sequence[Sequence[Item]], *, any_step: bool = False) -> list[list[int]]:
    """A number for each item of each stream: equal where they may be the same thing at different depths.

    A size that a birth of its label does not have in every stream grows with the depth, and does not count.

    Args:
        any_step: what warms up, in phases named with a trailing `*`, is the same as what follows.
    """
    labels = [[_steady(item.label) if any_step else item.label for item in items] for items in streams]
    sized = [
        [(label, item.num_bytes, item.last) for label, item in zip(*pair, strict=True)]
        for pair in zip(labels, streams, strict=True)
    ]
    everywhere = set.intersection(*map(set, sized))
    numbers: dict[tuple[object, ...], int] = {}
    found: list[list[int]] = []
    for items, sizes in zip(streams, sized, strict=True):
        own: list[int] = []
        for item, size in zip(items, sizes, strict=True):
            sign = (size if size in everywhere else size[0], None if item.born is None else own[item.born])
            own.append(numbers.setdefault(sign, len(numbers)))
        found.append(own)
    return found


def _steady(label: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(None if word is None else word.removesuffix("*") for word in label)


def insertions(shallow: Sequence[int], deep: Sequence[int]) -> list[Insertion]:
    """The blocks that make the shallower stream's signs the deeper one's.

    Raises:
        Irregular: there is no such set of blocks.
    """
    taken: list[tuple[int, int, int]] = []
    i = j = 0
    while True:
        while i < len(shallow) and j < len(deep) and shallow[i] == deep[j]:
            i, j = i + 1, j + 1
        if i == len(shallow) and j == len(deep):
            return _centered(taken, deep)
        size = _next_block(shallow, deep, i, j, longer_than=0)
        while size is None:  # an earlier block was taken for too short
            if not taken:
                raise Irregular
            i, j, before = taken.pop()
            size = _next_block(shallow, deep, i, j, longer_than=before)
        taken.append((i, j, size))
        j += GROWTH * size


def _next_block(shallow: Sequence[int], deep: Sequence[int], i: int, j: int, *, longer_than: int) -> int | None:
    """Size of the shortest block, longer than that, which the deeper stream repeats before the two agree again."""
    following = shallow[i : i + WINDOW]
    for size in range(longer_than + 1, (len(deep) - j - len(shallow) + i) // GROWTH + 1):
        behind = j + GROWTH * size
        if deep[j : behind - size] == deep[j + size : behind] and deep[behind : behind + len(following)] == following:
            return size
    return None


def _centered(taken: Sequence[tuple[int, int, int]], deep: Sequence[int]) -> list[Insertion]:
    """The blocks in the middle of where they could be: what they refer to then lies in blocks as well."""
    found: list[Insertion] = []
    end_i = end_j = 0
    for i, j, size in taken:
        length, room = GROWTH * size, min(i - end_i, j - end_j)
        slack = next((s for s in range(room) if deep[j - s - 1] != deep[j - s - 1 + length]), room)
        found.append(Insertion(i - slack // 2, j - slack // 2, size, slack))
        end_i, end_j = i, j + length
    return found
