"""PyTorch's CUDA caching allocator as arithmetic: a stream of allocations and frees in, bytes held on the card out.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` (torch 2.x, default settings, one stream, no graphs):

- sizes are rounded up to 512 bytes; up to 1 MiB they come from the small pool, above it from the large pool;
- a pool gives its smallest free block that fits, the lowest address among equals, and splits it when the rest is at
  least 512 bytes (small pool) or more than 1 MiB (large pool; a smaller rest stays part of the allocation);
- without such a block the card gives a segment: 2 MiB for the small pool; for the large one 20 MiB below 10 MiB, else
  the size rounded up to 2 MiB; freed neighbours of one segment merge, and segments are kept;
- each segment lies below those before it, as CUDA's driver hands out addresses: among equal blocks the newest is taken;
- when the card is full, segments without a live block are returned and the request is tried once more;
- with expandable segments each pool is one address range, backed by pages of 2 MiB (small) or 20 MiB (large) that are
  mapped at the lowest address where the request fits and, when the card is full, unmapped where a page is wholly free;
  every rest of 512 bytes or more is split off.

Requests to the card are exact: it has `capacity` bytes, in any order and without a driver's own rounding. The range of
an expandable segment never ends (torch's is 9/8 of the card).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from peftkit.errors import OutOfMemory
from peftkit.units import MIB, format_bytes

GRANULE = 512
SMALL_LIMIT = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
LARGE_SEGMENT_LIMIT = 10 * MIB
SEGMENT_GRANULE = 2 * MIB
ADDRESS_SPACE = LARGE_SEGMENT << 24
"""Bytes of an expandable segment's range: more than any card holds, and whole pages of either size."""
HIGHEST_ADDRESS = 1 << 50
"""Where the first segment ends: more than any run reserves, returned segments included."""


@dataclass(frozen=True, slots=True)
class Event:
    """A storage is born with `num_bytes`, or dies when they are 0."""

    tensor: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a stream of events took.

    Attributes:
        allocated_peak_bytes: the most held by live blocks, as `torch.cuda.max_memory_allocated` counts.
        reserved_peak_bytes: the most held from the card, as `torch.cuda.max_memory_reserved` counts.
        slack_bytes: reserved but not allocated, at the event of the reserved peak.
        allocated_peak_at: index of the first event at which allocated peaks; None without events.
        reserved_peak_at: the same for reserved.
        out_of_memory_at: index of the event that did not fit and ended the replay; None when all did.
        retries: times that the card was full and cached segments were returned, which stalls a real run.
    """

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    slack_bytes: int
    allocated_peak_at: int | None
    reserved_peak_at: int | None
    out_of_memory_at: int | None
    retries: int


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of mapped addresses: the storage that lives there, or None where it is free."""

    address: int
    num_bytes: int
    tensor: int | None


def replay(events: Iterable[Event], *, expandable: bool = False, capacity: int | None = None) -> Usage:
    """The peaks of a stream, and the event at which it no longer fits in `capacity` bytes."""
    allocator = CachingAllocator(expandable=expandable, capacity=capacity)
    allocated_peak = reserved_peak = slack = 0
    allocated_peak_at = reserved_peak_at = out_of_memory_at = None
    for index, event in enumerate(events):
        if event.num_bytes == 0:
            allocator.free(event.tensor)
            continue
        try:
            allocator.allocate(event.tensor, event.num_bytes)
        except OutOfMemory:
            out_of_memory_at = index
            break
        if allocator.allocated_bytes > allocated_peak:
            allocated_peak, allocated_peak_at = allocator.allocated_bytes, index
        if allocator.reserved_bytes > reserved_peak:
            reserved_peak, reserved_peak_at = allocator.reserved_bytes, index
            slack = reserved_peak - allocator.allocated_bytes
    return Usage(
        allocated_peak_bytes=allocated_peak,
        reserved_peak_bytes=reserved_peak,
        slack_bytes=slack,
        allocated_peak_at=allocated_peak_at,
        reserved_peak_at=reserved_peak_at,
        out_of_memory_at=out_of_memory_at,
        retries=allocator.retries,
    )


@dataclass(slots=True, eq=False)
class _Block:
    """A stretch of one segment; `prev` and `next` are its neighbours there."""

    address: int
    size: int
    prev: _Block | None = None
    next: _Block | None = None
    live: bool = False
    mapped: bool = True


class _Pool:
    """The free blocks of one size class, by size; with expandable segments also the ranges without memory."""

    def __init__(self, page_bytes: int, smallest_rest: int) -> None:
        self.page_bytes = page_bytes
        self.smallest_rest = smallest_rest
        self.unmapped: list[_Block] = []  # by address
        self.free: dict[int, _Block] = {}  # by address
        self._order: list[tuple[int, int]] = []  # (size, address) of each free block, sorted

    def take(self, size: int) -> _Block | None:
        """The smallest free block of at least `size` bytes, no longer among the free ones; None when there is none."""
        index = bisect_left(self._order, (size, 0))
        if index == len(self._order):
            return None
        if self.unmapped:
            # a block at the edge of mapped memory can grow: it counts with its room, and so is taken late
            while index + 1 < len(self._order) and self._room(index + 1) < self._room(index):
                index += 1
        return self.free.pop(self._order.pop(index)[1])

    def _room(self, index: int) -> int:
        block = self.free[self._order[index][1]]
        return block.size if block.next is None or block.next.mapped else block.size + block.next.size

    def add(self, block: _Block) -> None:
        insort(self._order, (block.size, block.address))
        self.free[block.address] = block

    def remove(self, block: _Block) -> None:
        del self._order[bisect_left(self._order, (block.size, block.address))]
        del self.free[block.address]

    def add_unmapped(self, block: _Block) -> None:
        insort(self.unmapped, block, key=lambda other: other.address)

    def give_back(self, block: _Block) -> None:
        """Put a block among the free ones, merged with its free neighbours."""
        self.absorb(block, block.prev)
        self.absorb(block, block.next)
        self.add(block)

    def absorb(self, block: _Block, neighbour: _Block | None) -> None:
        """Merge a neighbour into `block` if it is free and, like `block`, mapped or not."""
        if neighbour is None or neighbour.live or neighbour.mapped != block.mapped:
            return
        if neighbour.mapped:
            self.remove(neighbour)
        else:
            self.unmapped.remove(neighbour)
        if neighbour is block.prev:
            block.address = neighbour.address
            block.prev = neighbour.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = neighbour.next
            if block.next is not None:
                block.next.prev = block
        block.size += neighbour.size


def _cut(block: _Block, size: int) -> _Block:
    """Shorten `block` to its first `size` bytes; the rest is a new block behind it."""
    rest = _Block(block.address + size, block.size - size, prev=block, next=block.next, mapped=block.mapped)
    if rest.next is not None:
        rest.next.prev = rest
    block.next = rest
    block.size = size
    return rest


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


class CachingAllocator:
    """The allocator's state, moved by one allocation or free at a time."""

    def __init__(self, *, expandable: bool = False, capacity: int | None = None) -> None:
        self._expandable = expandable
        self._capacity = capacity
        self._small = _Pool(SMALL_SEGMENT, GRANULE)
        self._large = _Pool(LARGE_SEGMENT, GRANULE if expandable else SMALL_LIMIT + GRANULE)
        if expandable:
            self._small.add_unmapped(_Block(0, ADDRESS_SPACE, mapped=False))
            self._large.add_unmapped(_Block(ADDRESS_SPACE, ADDRESS_SPACE, mapped=False))
        self._live: dict[int, tuple[_Block, _Pool]] = {}
        self._next_address = HIGHEST_ADDRESS
        self._allocated = 0
        self._reserved = 0
        self._retries = 0

    @property
    def allocated_bytes(self) -> int:
        """Held by live blocks."""
        return self._allocated

    @property
    def reserved_bytes(self) -> int:
        """Held from the card."""
        return self._reserved

    @property
    def retries(self) -> int:
        """Times that the card was full and cached segments were returned."""
        return self._retries

    def allocate(self, tensor: int, num_bytes: int) -> None:
        """Give `tensor` a block of at least `num_bytes`, more than 0.

        Raises:
            OutOfMemory: the card is full even after cached segments were returned; nothing was allocated.
        """
        assert num_bytes > 0, "torch allocates nothing for an empty tensor"
        assert tensor not in self._live, f"{tensor} lives already"
        size = _round_up(num_bytes, GRANULE)
        pool = self._small if size <= SMALL_LIMIT else self._large
        block = pool.take(size) or self._grow(pool, size)
        if block is None:
            self._retries += 1
            self.empty_cache()
            block = self._grow(pool, size)
            if block is None:
                raise OutOfMemory(self._refusal(size))
        if block.size - size >= pool.smallest_rest:
            pool.add(_cut(block, size))
        block.live = True
        self._live[tensor] = (block, pool)
        self._allocated += block.size

    def free(self, tensor: int) -> None:
        """Take a live storage's block back."""
        block, pool = self._live.pop(tensor)
        self._allocated -= block.size
        block.live = False
        pool.give_back(block)

    def empty_cache(self) -> None:
        """Return to the card what no live block needs: whole segments, or whole pages of expandable ones."""
        for pool in (self._large, self._small):
            for block in [*pool.free.values()]:
                if self._expandable:
                    self._unmap(pool, block)
                elif block.prev is None and block.next is None:
                    pool.remove(block)
                    self._reserved -= block.size

    def snapshot(self) -> tuple[Span, ...]:
        """Everything reserved, by address: live blocks and free ones."""
        spans = [Span(block.address, block.size, tensor) for tensor, (block, _) in self._live.items()]
        spans += [
            Span(block.address, block.size, None) for p in (self._small, self._large) for block in p.free.values()
        ]
        return tuple(sorted(spans, key=lambda span: span.address))

    def _refusal(self, size: int) -> str:
        numbers = (size, self._reserved, self._capacity or 0, self._reserved - self._allocated)
        wanted, reserved, capacity, unused = map(format_bytes, numbers)
        return f"{wanted} do not fit: {reserved} of {capacity} are reserved, {unused} of them in unused pieces"

    def _reserve(self, num_bytes: int) -> bool:
        """Whether the card gave the bytes."""
        if self._capacity is not None and self._reserved + num_bytes > self._capacity:
            return False
        self._reserved += num_bytes
        return True

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        """A block of new memory that holds `size` bytes; None when the card is full."""
        if self._expandable:
            return self._extend(pool, size)
        if size <= SMALL_LIMIT:
            segment_bytes = SMALL_SEGMENT
        elif size < LARGE_SEGMENT_LIMIT:
            segment_bytes = LARGE_SEGMENT
        else:
            segment_bytes = _round_up(size, SEGMENT_GRANULE)
        if not self._reserve(segment_bytes):
            return None
        self._next_address -= segment_bytes
        return _Block(self._next_address, segment_bytes)

    def _extend(self, pool: _Pool, size: int) -> _Block | None:
        """The lowest stretch of free and unmapped blocks that holds `size` bytes, mapped as far as needed."""
        block = _lowest_stretch(pool, size)
        if not block.mapped and not self._map(pool, block, min(block.size, size)):
            return None
        while block.size < size:
            further = block.next
            assert further is not None, "the stretch was found long enough"
            if not self._map(pool, further, min(size - block.size, further.size)):
                return None
            block = further  # mapping merged the two
        pool.remove(block)
        return block

    def _map(self, pool: _Pool, block: _Block, size: int) -> bool:
        """Back the first pages of an unmapped block, at least `size` bytes; it joins its free neighbours."""
        mapped_bytes = _round_up(size, pool.page_bytes)
        if not self._reserve(mapped_bytes):
            return False
        pool.unmapped.remove(block)
        if mapped_bytes < block.size:
            pool.add_unmapped(_cut(block, mapped_bytes))
        block.mapped = True
        pool.give_back(block)
        return True

    def _unmap(self, pool: _Pool, block: _Block) -> None:
        """Return the whole pages inside a free block; what lies before and behind them stays free."""
        begin = _round_up(block.address, pool.page_bytes)
        end = (block.address + block.size) // pool.page_bytes * pool.page_bytes
        if begin >= end:
            return
        pool.remove(block)
        if end < block.address + block.size:
            pool.add(_cut(block, end - block.address))
        if block.address < begin:
            before, block = block, _cut(block, begin - block.address)
            pool.add(before)
        block.mapped = False
        pool.absorb(block, block.prev)
        pool.absorb(block, block.next)
        pool.add_unmapped(block)
        self._reserved -= end - begin


def _lowest_stretch(pool: _Pool, size: int) -> _Block:
    """The first block of the lowest run of free and unmapped blocks with `size` bytes between them."""
    for block in pool.unmapped:
        first = block.prev if block.prev is not None and not block.prev.live else block
        found, last = 0, first
        while found < size:
            found += last.size
            if last.next is None or last.next.live:
                break
            last = last.next
        if found >= size:
            return first
    raise AssertionError("the range of an expandable segment never ends")
