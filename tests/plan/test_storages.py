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


def test_what_is_made_on_the_host_does_not_count() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        with tracker.on_host():
            kept = torch.empty(FLOATS)
        kept += 1
        made = torch.empty(FLOATS)
        assert live_bytes(tracker) == BYTES
        del kept, made


def test_storages_that_die_together_die_in_the_order_of_their_births() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        first, second, third = (torch.empty(FLOATS) for _ in range(3))
        del third, first
        second += 1  # work in between: what dies after it does not die with them
        fourth = torch.empty(FLOATS)
        del fourth, second
    deaths = [event.tensor for event in tracker.take().events if not event.num_bytes]
    assert deaths == [0, 2, 1, 3]


def test_what_happens_after_the_stream_was_taken_is_not_part_of_it() -> None:
    with fake_tensors(masked=False), StorageTracker() as tracker:
        x = torch.empty(FLOATS)
        stream = tracker.take()
        del x
    assert stream.events == [Event(0, BYTES)]


def test_births_are_told_by_module_without_hooks_on_any() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    with fake_tensors(masked=False), StorageTracker() as tracker:
        tracker.watch(model)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        model(torch.empty(5, 2))
    before = len(tracker.stream.births)
    model(torch.empty(5, 2))
    assert [birth.module for birth in tracker.stream.births if birth.operator == "aten.relu.default"] == ["1"]
    assert len(tracker.stream.births) == before
