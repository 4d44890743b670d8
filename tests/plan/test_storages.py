"""What the tracker sees of tensors that come and go."""

from __future__ import annotations

import torch

from peftkit.plan.allocator import Event
from peftkit.plan.fake import fake_tensors
from peftkit.plan.storages import Scratch, StorageTracker

FLOATS = 1000
BYTES = 4 * FLOATS


def live_bytes(tracker: StorageTracker) -> int:
    stream = tracker.stream
    return sum(stream.births[number].num_bytes for number in stream.live_at(len(stream.events) - 1))


def test_a_storage_lives_until_its_last_view_is_gone() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        whole = torch.empty(FLOATS)
        half = whole[: FLOATS // 2]
        del whole
        assert live_bytes(tracker) == BYTES
        del half
        assert live_bytes(tracker) == 0
    assert tracker.stream.events == [Event(0, BYTES), Event(0, 0)]


def test_gradients_that_meet_are_summed_in_place_as_autograd_does_without_a_mode() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        x = torch.empty(FLOATS, requires_grad=True)
        (x.sin() + x.exp()).sum().backward()
    made = [birth.operator for birth in tracker.stream.births]
    assert made.count("aten.add.Tensor") == 1  # the one of the forward pass


def test_a_gradient_that_something_else_holds_is_not_overwritten() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        x = torch.empty(FLOATS, requires_grad=True)
        y = x * 1
        y.retain_grad()
        (y + y).sum().backward()
    assert [birth.operator for birth in tracker.stream.births].count("aten.add.Tensor") == 2


def test_constants_written_down_in_python_stay_on_the_host() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        step = torch.tensor(0.0)
        step += 1
    assert tracker.stream.births == []


def test_scratch_lives_beside_the_outputs_and_dies_with_the_call() -> None:
    sine = torch.ops.aten.sin.default
    for first in (True, False):
        with (
            fake_tensors(masked=False),
            StorageTracker({sine: Scratch(lambda args, kwargs: [7], first=first)}) as tracker,
        ):
            x = torch.empty(FLOATS)
            y = x.sin()
            assert live_bytes(tracker) == 2 * BYTES
        sizes = [event.num_bytes for event in tracker.stream.events[:4]]
        assert sizes == ([BYTES, 7, BYTES, 0] if first else [BYTES, BYTES, 7, 0])
        del x, y


def test_work_is_counted_by_phase() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        tracker.enter("forward")
        torch.empty(2, 3) @ torch.empty(3, 5)
    assert tracker.stream.flops == {"forward": 2 * 2 * 3 * 5}
    # both factors read, the product written
    assert tracker.stream.moved_bytes["forward"] >= 4 * (2 * 3 + 3 * 5 + 2 * 5)


def test_a_product_added_in_place_is_work_too() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        tracker.enter("forward")
        torch.empty(2, 5).addmm_(torch.empty(2, 3), torch.empty(3, 5))
    assert tracker.stream.flops == {"forward": 2 * 2 * 3 * 5}
