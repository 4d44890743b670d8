"""The model of the caching allocator: scenarios worked out by hand from its rules, and what must always hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import OutOfMemory
from peftkit.plan.allocator import CachingAllocator, Event, Usage, replay
from peftkit.units import MIB


def allocator_with(*mebibytes: float, expandable: bool = False, capacity: int | None = None) -> CachingAllocator:
    """Storages 0, 1, ... of these sizes, all alive."""
    allocator = CachingAllocator(expandable=expandable, capacity=capacity)
    for tensor, size in enumerate(mebibytes):
        allocator.allocate(tensor, int(size * MIB))
    return allocator


def address_of(allocator: CachingAllocator, tensor: int) -> float:
    """Where a live storage starts, in MiB."""
    return next(span.address for span in allocator.snapshot() if span.tensor == tensor) / MIB


@pytest.mark.parametrize(
    ("num_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + MIB // 2, 10 * MIB + MIB // 2, 12 * MIB),
    ],
)
def test_sizes_are_rounded_and_segments_come_in_three_kinds(num_bytes: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, num_bytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_a_large_rest_of_one_mebibyte_stays_part_of_the_allocation() -> None:
    # 11 MiB come in a segment of 12: the rest is 1 MiB, and only more than that is split off
    assert allocator_with(11).allocated_bytes == 12 * MIB
    assert allocator_with(10.75).allocated_bytes == 10.75 * MIB
    # expandable segments split off any rest: 20 MiB page, 11 taken
    assert allocator_with(11, expandable=True).allocated_bytes == 11 * MIB


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    assert allocator_with(*[0.5] * 4).reserved_bytes == 2 * MIB
    assert allocator_with(*[0.5] * 5).reserved_bytes == 4 * MIB


def test_the_pools_do_not_lend_to_each_other() -> None:
    # 16 of the large segment's 20 MiB are free, and 512 bytes still open a small one
    allocator = allocator_with(4)
    allocator.allocate(1, 1)
    assert allocator.reserved_bytes == 22 * MIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    # one large segment: 6 | 2 | 3 | 2 | 7; with 0 and 2 freed, holes of 6 at 0 and 3 at 8, and 7 at 13
    allocator = allocator_with(6, 2, 3, 2)
    start = address_of(allocator, 0)
    allocator.free(0)
    allocator.free(2)
    allocator.allocate(4, 2 * MIB)
    assert address_of(allocator, 4) - start == 8
    assert allocator.reserved_bytes == 20 * MIB


@pytest.mark.parametrize("order", [(0, 2), (2, 0)])
def test_of_equal_blocks_the_lowest_is_taken(order: tuple[int, int]) -> None:
    allocator = allocator_with(0.5, 0.5, 0.5, 0.5)
    start = address_of(allocator, 0)
    for tensor in order:
        allocator.free(tensor)
    allocator.allocate(4, MIB // 2)
    assert address_of(allocator, 4) == start


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_equal_blocks_in_two_segments_the_newer_segments_is_taken(order: tuple[int, int]) -> None:
    # the card's addresses fall: the second segment of 12 MiB ends where the first begins
    allocator = allocator_with(12, 12)
    assert address_of(allocator, 1) == address_of(allocator, 0) - 12
    newer = address_of(allocator, 1)
    for tensor in order:
        allocator.free(tensor)
    allocator.allocate(2, 12 * MIB)
    assert address_of(allocator, 2) == newer


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_freed_neighbours_merge(order: tuple[int, int, int]) -> None:
    # 4 + 5 + 6 MiB and a rest of 5 are one segment; only merged do they hold 9 MiB twice
    allocator = allocator_with(4, 5, 6)
    for tensor in order:
        allocator.free(tensor)
    assert [(span.num_bytes, span.tensor) for span in allocator.snapshot()] == [(20 * MIB, None)]
    allocator.allocate(3, 9 * MIB)
    allocator.allocate(4, 9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_blocks_of_different_segments_never_merge() -> None:
    # two segments of 12 MiB, both free: 24 MiB in all, but 14 do not fit in either
    allocator = allocator_with(12, 12)
    allocator.free(0)
    allocator.free(1)
    allocator.allocate(2, 14 * MIB)
    assert allocator.reserved_bytes == (12 + 12 + 14) * MIB


GROWING = [Event(0, 12 * MIB), Event(0, 0), Event(1, 14 * MIB), Event(1, 0), Event(2, 16 * MIB), Event(2, 0)]
"""Batches that get longer: each step needs a little more than the last one left."""


def test_growing_requests_fragment_what_is_reserved() -> None:
    # no segment serves the next request: 12 + 14 + 16 reserved, 16 of them used at the last event that grows
    assert replay(GROWING) == Usage(
        allocated_peak_bytes=16 * MIB,
        reserved_peak_bytes=42 * MIB,
        slack_bytes=26 * MIB,
        allocated_peak_at=4,
        reserved_peak_at=4,
        out_of_memory_at=None,
        retries=0,
    )


def test_an_expandable_segment_serves_growing_requests_from_one_page() -> None:
    # one page of 20 MiB holds each of the three in turn
    usage = replay(GROWING, expandable=True)
    assert (usage.allocated_peak_bytes, usage.reserved_peak_bytes) == (16 * MIB, 20 * MIB)
    assert (usage.allocated_peak_at, usage.reserved_peak_at) == (4, 0)
    assert usage.slack_bytes == (20 - 12) * MIB


def test_a_full_card_gets_cached_segments_back() -> None:
    # 12 + 14 are cached when 16 would make 42 of 40: both go back, and 16 fit
    usage = replay(GROWING, capacity=40 * MIB)
    assert (usage.reserved_peak_bytes, usage.retries, usage.out_of_memory_at) == (26 * MIB, 1, None)


def test_a_segment_with_a_live_block_stays_on_a_full_card() -> None:
    # 16 MiB need the free segment of 14 back; the one of 12 stays for the 2 MiB alive in it, 10 of it unused
    allocator = allocator_with(12, 14, capacity=28 * MIB)
    allocator.free(0)
    allocator.allocate(2, 2 * MIB)
    allocator.free(1)
    allocator.allocate(3, 16 * MIB)
    assert allocator.reserved_bytes == (12 + 16) * MIB
    with pytest.raises(OutOfMemory, match=r"11\.0 MiB do not fit: 28\.0 MiB of 28\.0 MiB are reserved, 10\.0 MiB"):
        allocator.allocate(4, 11 * MIB)
    assert allocator.allocated_bytes == 18 * MIB


def test_the_replay_ends_at_the_event_that_does_not_fit() -> None:
    events = [Event(0, 12 * MIB), Event(1, 12 * MIB), Event(2, 12 * MIB), Event(3, 1)]
    usage = replay(events, capacity=30 * MIB)
    assert usage.out_of_memory_at == 2
    assert (usage.allocated_peak_bytes, usage.allocated_peak_at) == (24 * MIB, 1)


def test_a_peak_is_where_it_is_first_reached() -> None:
    usage = replay([Event(0, 12 * MIB), Event(0, 0), Event(1, 12 * MIB)])
    assert (usage.allocated_peak_at, usage.reserved_peak_at) == (0, 0)


def test_a_stream_without_events_peaks_nowhere() -> None:
    assert replay([]) == Usage(0, 0, 0, None, None, None, 0)


def test_an_expandable_segment_grows_from_the_free_end() -> None:
    # 18 of 20 MiB are taken; 12 more use the free 2 and one further page of 20
    allocator = allocator_with(18, 12, expandable=True)
    assert address_of(allocator, 1) - address_of(allocator, 0) == 18
    assert allocator.reserved_bytes == 40 * MIB


def test_the_expandable_end_is_taken_last() -> None:
    # 10 free at the start, 4 free at the end: the end fits 3 MiB more tightly but can grow, so the hole serves them
    allocator = allocator_with(10, 6, expandable=True)
    start = address_of(allocator, 0)
    allocator.free(0)
    allocator.allocate(2, 3 * MIB)
    assert address_of(allocator, 2) == start


def test_small_requests_map_pages_of_two_mebibytes() -> None:
    allocator = allocator_with(1, 1, 0.5, expandable=True)
    assert allocator.reserved_bytes == 4 * MIB


def test_a_full_card_gets_whole_free_pages_back() -> None:
    # 2 MiB live at the start of three pages of 20: a small request gets its page from the two that are wholly free
    allocator = allocator_with(2, 58, expandable=True, capacity=60 * MIB)
    allocator.free(1)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.allocate(2, 512)
    assert (allocator.reserved_bytes, allocator.retries) == (22 * MIB, 1)
    # the 18 MiB left of the first page and one new page serve 38 MiB
    allocator.allocate(3, 38 * MIB)
    assert allocator.reserved_bytes == 42 * MIB
    assert address_of(allocator, 3) - address_of(allocator, 0) == 2


def test_unmapped_pages_move_to_where_they_are_needed() -> None:
    # pages A, B, C of 20 MiB with B alive: 40 MiB fit nowhere, so A's page is unmapped and mapped behind C
    allocator = allocator_with(20, 20, 20, expandable=True, capacity=60 * MIB)
    start = address_of(allocator, 0)
    allocator.free(0)
    allocator.free(2)
    allocator.allocate(3, 40 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    assert address_of(allocator, 3) - start == 40


def test_half_a_page_on_either_side_is_no_page() -> None:
    # 15 | 10 free | 15 on two pages of 20: no page is wholly free, so that none goes back
    allocator = allocator_with(15, 10, 15, expandable=True, capacity=40 * MIB)
    allocator.free(1)
    with pytest.raises(OutOfMemory):
        allocator.allocate(3, 512)
    allocator.free(0)
    allocator.free(2)
    assert [span.num_bytes for span in allocator.snapshot()] == [40 * MIB]


def test_pages_that_do_not_fit_together_are_not_mapped_at_all() -> None:
    # the returned page is again part of the empty range: 40 MiB of it are asked for at once, and 30 are there
    allocator = allocator_with(20, expandable=True, capacity=30 * MIB)
    allocator.free(0)
    allocator.empty_cache()
    with pytest.raises(OutOfMemory):
        allocator.allocate(1, 40 * MIB)
    assert allocator.reserved_bytes == 0


SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 2 * MIB), st.integers(1, 30 * MIB))
CHOICES = st.lists(st.one_of(SIZES, st.integers(-20, -1)), max_size=80)
"""Positive: allocate so many bytes. Negative: free the n-th youngest live storage, if there are so many."""


@settings(deadline=None)
@given(choices=CHOICES, expandable=st.booleans(), capacity=st.sampled_from([None, 60 * MIB]))
def test_the_state_stays_sound(choices: list[int], expandable: bool, capacity: int | None) -> None:
    allocator = CachingAllocator(expandable=expandable, capacity=capacity)
    rounded: dict[int, int] = {}
    for tensor, choice in enumerate(choices):
        if choice > 0:
            try:
                allocator.allocate(tensor, choice)
            except OutOfMemory:
                continue
            rounded[tensor] = -(-choice // 512) * 512
        elif len(rounded) >= -choice:
            gone = list(rounded)[choice]
            allocator.free(gone)
            del rounded[gone]
        spans = allocator.snapshot()
        assert all(one.address + one.num_bytes <= other.address for one, other in pairwise(spans))
        live = {span.tensor: span.num_bytes for span in spans if span.tensor is not None}
        assert live.keys() == rounded.keys()
        # a rest of up to 1 MiB is left on a large block, never on a small one nor in an expandable segment
        unsplit = {t: 0 if expandable or size <= MIB else MIB for t, size in rounded.items()}
        assert all(size <= live[t] <= size + unsplit[t] for t, size in rounded.items())
        assert allocator.allocated_bytes == sum(live.values())
        assert allocator.reserved_bytes == sum(span.num_bytes for span in spans) >= allocator.allocated_bytes
        assert capacity is None or allocator.reserved_bytes <= capacity
    for tensor in rounded:
        allocator.free(tensor)
    assert allocator.allocated_bytes == 0
    # only whole segments and pages go back, so that nothing is left proves that every piece was merged
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.snapshot()) == (0, ())
