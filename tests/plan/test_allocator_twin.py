"""The allocator against slow twins, which keep no lists of blocks: they look every free stretch up anew."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import OutOfMemory
from peftkit.plan.allocator import ADDRESS_SPACE, HIGHEST_ADDRESS, CachingAllocator
from peftkit.units import MIB

Interval = tuple[int, int]
"""First and last plus one, in bytes."""


def gaps(taken: Iterable[Interval], begin: int, end: int) -> list[Interval]:
    """What the taken intervals leave of a stretch."""
    found = []
    for first, last in sorted(interval for interval in taken if begin <= interval[0] < end):
        if begin < first:
            found.append((begin, first))
        begin = last
    return [*found, (begin, end)] if begin < end else found


class SegmentedTwin:
    """Segments one below the other, from address 0 down, and where each storage lies."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.segments: dict[Interval, bool] = {}  # its stretch -> whether it is of the small pool
        self.live: dict[int, Interval] = {}
        self.lowest = 0

    @property
    def reserved(self) -> int:
        return sum(end - begin for begin, end in self.segments)

    def allocate(self, tensor: int, num_bytes: int) -> bool:
        size = (num_bytes + 511) // 512 * 512
        small = size <= MIB
        stretches = [
            gap
            for (begin, end), is_small in self.segments.items()
            if is_small == small
            for gap in gaps(self.live.values(), begin, end)
            if gap[1] - gap[0] >= size
        ]
        if stretches:
            begin, end = min(stretches, key=lambda gap: (gap[1] - gap[0], gap[0]))
        else:
            wanted = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            if self.reserved + wanted > self.capacity:
                self.segments = {
                    (begin, end): small
                    for (begin, end), small in self.segments.items()
                    if gaps(self.live.values(), begin, end) != [(begin, end)]
                }
            if self.reserved + wanted > self.capacity:
                return False
            begin, end = self.lowest - wanted, self.lowest
            self.segments[begin, end] = small
            self.lowest = begin
        rest = end - begin - size
        self.live[tensor] = (begin, begin + size if rest > MIB or (small and rest) else end)
        return True

    def free(self, tensor: int) -> None:
        del self.live[tensor]


class ExpandableTwin:
    """Which pages of an endless range have memory, and where each storage lies; one range for each pool."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.page = {True: 2 * MIB, False: 20 * MIB}
        self.mapped: dict[bool, set[int]] = {True: set(), False: set()}
        self.ranges: dict[bool, dict[int, Interval]] = {True: {}, False: {}}
        self.horizon = 100 * capacity

    @property
    def reserved(self) -> int:
        return sum(len(self.mapped[small]) * self.page[small] for small in (True, False))

    @property
    def live(self) -> dict[int, Interval]:
        return self.ranges[True] | self.ranges[False]

    def allocate(self, tensor: int, num_bytes: int) -> bool:
        size = (num_bytes + 511) // 512 * 512
        small = size <= MIB
        begin = self.best(small, size)
        if begin is None:
            begin = self.lowest(small, size)
            if not self.map(small, begin, begin + size):
                self.unmap()
                begin = self.lowest(small, size)
                if not self.map(small, begin, begin + size):
                    return False
        self.ranges[small][tensor] = (begin, begin + size)
        return True

    def free(self, tensor: int) -> None:
        for storages in self.ranges.values():
            storages.pop(tensor, None)

    def unmapped(self, small: bool) -> list[Interval]:
        page = self.page[small]
        return gaps([(index * page, (index + 1) * page) for index in self.mapped[small]], 0, self.horizon)

    def best(self, small: bool, size: int) -> int | None:
        """The tightest mapped stretch, passed over for the next as long as that has less room to grow."""
        unmapped = self.unmapped(small)
        room = {begin: end - begin for begin, end in unmapped}
        free = gaps([*self.ranges[small].values(), *unmapped], 0, self.horizon)
        fitting = sorted((end - begin, begin) for begin, end in free if end - begin >= size)
        rooms = [length + room.get(begin + length, 0) for length, begin in fitting]
        chosen = 0
        while chosen + 1 < len(rooms) and rooms[chosen + 1] < rooms[chosen]:
            chosen += 1
        return fitting[chosen][1] if fitting else None

    def lowest(self, small: bool, size: int) -> int:
        """Where the first long enough stretch without a storage begins that is not all mapped."""
        holes = [begin for begin, _ in self.unmapped(small)]
        free = gaps(self.ranges[small].values(), 0, self.horizon)
        partly = [(begin, end) for begin, end in free if any(begin <= hole < end for hole in holes)]
        return next(begin for begin, end in partly if end - begin >= size)

    def map(self, small: bool, begin: int, end: int) -> bool:
        """Hole by hole, as far as the capacity reaches."""
        page = self.page[small]
        for hole in self.unmapped(small):
            wanted = [index for index in range(hole[0] // page, hole[1] // page) if begin < (index + 1) * page]
            wanted = [index for index in wanted if index * page < end]
            if self.reserved + len(wanted) * page > self.capacity:
                return False
            self.mapped[small] |= set(wanted)
        return True

    def unmap(self) -> None:
        for small, page in self.page.items():
            lived_in = {
                index
                for begin, end in self.ranges[small].values()
                for index in range(begin // page, (end - 1) // page + 1)
            }
            self.mapped[small] &= lived_in


SIZES = st.one_of(st.integers(1, MIB), st.sampled_from([4, 9, 10.5, 11, 14, 20, 38]).map(lambda n: int(n * MIB)))
CHOICES = st.lists(st.one_of(SIZES, st.integers(-12, -1)), max_size=60)
"""Positive: allocate so many bytes. Negative: free the n-th youngest live storage, if there are so many."""


@settings(deadline=None)
@given(choices=CHOICES, expandable=st.booleans(), capacity=st.sampled_from([100 * MIB, 1000 * MIB]))
def test_every_block_lies_where_the_twin_puts_it(choices: list[int], expandable: bool, capacity: int) -> None:
    allocator = CachingAllocator(expandable=expandable, capacity=capacity)
    twin = ExpandableTwin(capacity) if expandable else SegmentedTwin(capacity)
    for tensor, choice in enumerate(choices):
        if choice > 0:
            assert allocates(allocator, tensor, choice) == twin.allocate(tensor, choice)
        elif len(twin.live) >= -choice:
            gone = sorted(twin.live)[choice]
            allocator.free(gone)
            twin.free(gone)
        live = [span for span in allocator.snapshot() if span.tensor is not None]
        begins = [span.address % ADDRESS_SPACE if expandable else span.address - HIGHEST_ADDRESS for span in live]
        spans = {span.tensor: (begin, begin + span.num_bytes) for span, begin in zip(live, begins, strict=True)}
        assert spans == twin.live
        assert allocator.reserved_bytes == twin.reserved


def allocates(allocator: CachingAllocator, tensor: int, num_bytes: int) -> bool:
    try:
        allocator.allocate(tensor, num_bytes)
    except OutOfMemory:
        return False
    return True
