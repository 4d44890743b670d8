"""The stream of a deep model, from a shallow one's and those of models a little deeper in one stretch of layers each.

What a deeper model's stream has more is a block for each layer more, at several places: where weights are loaded, in
the forward pass, in the backward pass, in each sweep over parameters. The stream of the full depth has that block more
often. A storage that dies in a block was born in the block itself, in a neighbour, or in the mirrored block of another
place; amounts that differ with the depth (of what holds the norms of all gradients, say) grow by as much each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from peftkit.plan.align import GROWTH, Insertion, Irregular, Item, insertions, read_items, signs
from peftkit.plan.allocator import Event
from peftkit.plan.storages import Birth, Stream

TURNS: Final = {
    (0, 1): (1, 0),
    (None, 0): (1, -1),
    (1, None): (1, 1),
    (1, 0): (-1, -1),
    (0, None): (-1, -2),
    (None, 1): (-1, 0),
}
"""Which repetitions the first and the second one refer to, None outside of them all -> the direction in which it goes
on, and where it starts: from the first repetition, or in the other direction from behind the last."""


@dataclass(frozen=True, slots=True)
class Deeper:
    """The stream of a model that repeats one stretch of layers `GROWTH` times more; `extra` times it shall be."""

    stream: Stream
    extra: int


class Place(NamedTuple):
    """Where an item of the full stream comes from: the shallow stream (no group), or a block of a deeper one."""

    group: int | None
    run: int
    repetition: int
    item: int


def repeat(shallow: Stream, deeper: Sequence[Deeper], *, period: int = 1) -> Stream:
    """The stream of the full depth.

    Args:
        deeper: for each stretch of layers that the shallow model cuts short, from the lowest up.
        period: layers of a repetition.

    Raises:
        Irregular: the streams do not say how it goes on.
    """
    items, *others = (read_items(stream) for stream in (shallow, *(other.stream for other in deeper)))
    shallow_signs, *deep_signs = signs([items, *others])
    kinds = signs([items, *others], any_step=True)[1:]
    runs = _apart([insertions(shallow_signs, deep) for deep in deep_signs], others)
    grown = [_Grown(group, others[group], kinds[group], runs[group], other.extra) for group, other in enumerate(deeper)]
    return _Writer(items, grown, period).write()


def _apart(groups: Sequence[Sequence[Insertion]], deep: Sequence[Sequence[Item]]) -> list[list[Insertion]]:
    """The blocks of each stretch; where stretches compute alike theirs could lie anywhere in all of them, and one
    behind the other is where they do not refer to each other.

    Args:
        deep: the items of the model that is deeper in each stretch.
    """
    sharing: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for group, runs in enumerate(groups):
        for run in runs:
            alike = sharing.setdefault((run.at, run.size, run.slack), [])
            alike.append((_referred(run, runs, deep[group]), group))

    def parted(group: int, run: Insertion) -> Insertion:
        order = [other for _, other in sorted(sharing[run.at, run.size, run.slack])]
        return run.share(order.index(group), len(order))

    return [[parted(group, run) for run in runs] for group, runs in enumerate(groups)]


def _referred(run: Insertion, runs: Sequence[Insertion], items: Sequence[Item]) -> int:
    """Where the blocks are whose births a block's deaths end, as these come in the order of those: gradients from the
    uppermost layer down. 0 for a block of births."""
    around = items[max(0, run.start - run.slack) : run.start + GROWTH * run.size + run.slack]
    births = [item.born for item in around if item.born is not None]

    def hits(other: Insertion) -> int:
        return sum(other.start <= birth < other.start + GROWTH * other.size for birth in births)

    found = max(runs, key=hits)
    return found.at if hits(found) and items[run.start].born is not None else 0


class _Grown:
    """A deeper stream, and where its items belong.

    Attributes:
        outside: for each item of the shallow stream, the one here.
        places: for each item here, its place; repetitions are the two that there are.
        amounts: an item's kind, a column of its amounts, the amount here -> that of the full depth; None where the same
            amount here does not always become the same.
    """

    def __init__(self, group: int, items: list[Item], kinds: list[int], runs: list[Insertion], extra: int) -> None:
        self.items, self.kinds, self.runs, self.extra = items, kinds, runs, extra
        self.outside: list[int] = []
        self.places: list[Place] = []
        self.amounts: dict[tuple[int, int, int], int | None] = {}
        size = len(items) - GROWTH * sum(run.size for run in runs)
        for number, run in enumerate([*runs, Insertion(size, len(items), 0)]):
            for index in range(len(self.outside), run.at):
                self.outside.append(len(self.places))
                self.places.append(Place(None, 0, 0, index))
            self.places += [Place(group, number, rep, item) for rep in range(GROWTH) for item in range(run.size)]

    def learn(self, index: int, amounts: Sequence[int]) -> None:
        """Note the amounts that an item outside of the blocks has at the full depth."""
        for column, (here, full) in enumerate(zip(self.items[index].amounts, amounts, strict=True)):
            key = self.kinds[index], column, here
            if self.amounts.setdefault(key, full) != full:
                self.amounts[key] = None

    def full(self, index: int) -> tuple[int, ...]:
        """The amounts of an item of a block at the full depth: those of its like outside of the blocks."""
        found = [self.amounts.get((self.kinds[index], *pair)) for pair in enumerate(self.items[index].amounts)]
        known = tuple(amount for amount in found if amount is not None)
        if len(known) < len(found):
            raise Irregular
        return known

    def born(self, index: int) -> Place:
        """Where the birth belongs that a death here ends."""
        birth = self.items[index].born
        assert birth is not None
        return self.places[birth]


class _Writer:
    """Writes the stream of the full depth."""

    def __init__(self, items: list[Item], grown: Sequence[_Grown], period: int) -> None:
        self.items, self.grown, self.period = items, grown, period
        self.stream = Stream()
        self.alive: dict[Place, int] = {}

    def write(self) -> Stream:
        """The whole stream."""
        amounts = [self._amounts(index) for index in range(len(self.items))]
        runs = sorted(
            (run.at, group, number) for group, g in enumerate(self.grown) for number, run in enumerate(g.runs)
        )
        written = 0
        for at, group, number in [*runs, (len(self.items), -1, 0)]:
            for index in range(written, at):
                self._write_outside(index, amounts[index])
            written = at
            if group >= 0:
                self._write_run(group, number)
        self.stream.order_deaths()
        return self.stream

    def _amounts(self, index: int) -> tuple[int, ...]:
        """An item's amounts at the full depth."""
        found = list(self.items[index].amounts)
        for grown in self.grown:
            deeper = grown.items[grown.outside[index]].amounts
            for column, (amount, other) in enumerate(zip(self.items[index].amounts, deeper, strict=True)):
                found[column] += self._grow(other - amount, grown.extra)
        for grown in self.grown:
            grown.learn(grown.outside[index], found)
        return tuple(found)

    def _write_outside(self, index: int, amounts: tuple[int, ...]) -> None:
        item, place = self.items[index], Place(None, 0, 0, index)
        indices = list(item.indices)
        for grown in self.grown:
            deeper = grown.items[grown.outside[index]].indices
            for position, (one, other) in enumerate(zip(item.indices, deeper, strict=True)):
                indices[position] += self._grow(other - one, grown.extra)
        born = None if item.born is None else self._born_outside(index, item.born)
        self._write(item.label, amounts, indices, place, born)

    def _born_outside(self, index: int, birth: int) -> Place:
        """The birth that a death outside of the blocks ends: at most one stretch of layers moves it."""
        own = Place(None, 0, 0, birth)
        moved = []
        for grown in self.grown:
            seen = grown.born(grown.outside[index])
            if seen != own and grown.extra:
                moved.append(seen if seen.repetition == 0 else seen._replace(repetition=grown.extra - 1))
        if len(moved) > 1:
            raise Irregular
        return moved[0] if moved else own

    def _write_run(self, group: int, number: int) -> None:
        grown, run = self.grown[group], self.grown[group].runs[number]
        below = self.period * sum(other.extra for other in self.grown[:group])
        steps = [self._step(grown, run.start + offset, run.size, below) for offset in range(run.size)]
        for repetition in range(grown.extra):
            for offset, step in enumerate(steps):
                indices = [start + rise * repetition for start, rise in step.indices]
                born = None if step.born is None else step.born.at(repetition, grown.extra)
                self._write(step.label, step.amounts, indices, Place(group, number, repetition, offset), born)

    def _step(self, grown: _Grown, index: int, size: int, below: int) -> _Step:
        """How an item of a block goes on, read off its first two repetitions.

        Args:
            below: layers that the stretches below have more at the full depth.
        """
        first, second = grown.items[index], grown.items[index + size]
        rises = [b - a for a, b in zip(first.indices, second.indices, strict=True)]
        if first.amounts != second.amounts or any(abs(rise) not in (0, self.period) for rise in rises):
            raise Irregular
        # layers that are counted down begin as many higher as there are more
        higher = self.period * (grown.extra - GROWTH)
        starts = [
            a + (below if rise else 0) + (higher if rise < 0 else 0)
            for a, rise in zip(first.indices, rises, strict=True)
        ]
        born = None if first.born is None else _reference(grown.born(index), grown.born(index + size))
        return _Step(first.label, grown.full(index), tuple(zip(starts, rises, strict=True)), born)

    def _grow(self, difference: int, extra: int) -> int:
        """What `extra` repetitions add where `GROWTH` of them add the difference."""
        if difference * extra % GROWTH:
            raise Irregular
        return difference * extra // GROWTH

    def _write(
        self,
        label: tuple[str | None, ...],
        amounts: Sequence[int],
        indices: Sequence[int],
        place: Place,
        born: Place | None,
    ) -> None:
        """One item, and the work behind it."""
        stream, (num_bytes, last, flops, moved_bytes) = self.stream, amounts
        match label:
            case ("birth", phase, module, operator, kind):
                self.alive[place] = len(stream.births)
                stream.events.append(Event(len(stream.births), num_bytes))
                path = _filled(module or "", indices)
                stream.births.append(Birth(num_bytes, phase or "", path, operator or "", last, kind))
            case ("death",):
                assert born is not None
                if born not in self.alive:
                    raise Irregular
                stream.events.append(Event(self.alive.pop(born), 0))
            case ("phase", name):
                stream.phases.append((len(stream.events), name or ""))
            case ("emptied",):
                stream.emptied.add(len(stream.events))
        if flops or moved_bytes:
            stream.add_work(flops, moved_bytes)


@dataclass(frozen=True, slots=True)
class _Reference:
    """Which births the deaths of a block end in all its repetitions.

    Attributes:
        inside: such a birth in a run of blocks.
        outside: what it is where the run has no such repetition.
        direction, start: from `TURNS`.
    """

    inside: Place
    outside: Place | None
    direction: int
    start: int

    def at(self, repetition: int, extra: int) -> Place:
        """The birth's place, with so many repetitions in all."""
        found = self.start + repetition if self.direction > 0 else extra + self.start - repetition
        if 0 <= found < extra:
            return self.inside._replace(repetition=found)
        if self.outside is None:
            raise Irregular
        return self.outside


def _reference(first: Place, second: Place) -> _Reference:
    """What goes on from the places that the first two repetitions refer to."""
    inside = [place for place in (first, second) if place.group is not None]
    outside = [place for place in (first, second) if place.group is None]
    repetitions = [None if place.group is None else place.repetition for place in (first, second)]
    turn = TURNS.get((repetitions[0], repetitions[1]))
    if turn is None or len({place._replace(repetition=0) for place in inside}) != 1:
        raise Irregular
    return _Reference(inside[0], outside[0] if outside else None, *turn)


@dataclass(frozen=True, slots=True)
class _Step:
    """An item of a block in all its repetitions.

    Attributes:
        indices: first number, and by how much it rises with each repetition.
    """

    label: tuple[str | None, ...]
    amounts: tuple[int, ...]
    indices: tuple[tuple[int, int], ...]
    born: _Reference | None


def _filled(module: str, indices: Sequence[int]) -> str:
    """The path of a module whose numbers were replaced."""
    if not indices:
        return module
    first, *others = module.split("#")
    return first + "".join(f"{index}{part}" for index, part in zip(indices, others, strict=True))
