"""What a simulated run needed: peaks, the moment of the peak, and its terms."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from peftkit.backbones.dims import LAYER_INDEX
from peftkit.plan.allocator import CachingAllocator
from peftkit.plan.storages import Birth, Stream

KINDS = {"self_attn": "attention", "attention": "attention", "mlp": "feed-forward", "intermediate": "feed-forward"}


@dataclass(frozen=True, slots=True)
class Simulation:
    """The memory and work of the last of a few simulated optimizer steps.

    Attributes:
        allocated_bytes: peak of what the allocator hands out.
        reserved_bytes: peak of what it holds of the card; as `allocated_bytes` on the host.
        context_bytes: outside of the allocator.
        phase: in which allocated peaks.
        terms: bytes at that moment by what they are; with the allocator's slack and the context they sum to the total.
        phase_peaks: allocated by phase.
        timeline: phase and allocated bytes, at every change of more than a thousandth of the peak.
        flops: floating-point operations by phase.
        moved_bytes: read and written by operators, by phase.
    """

    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    phase: str
    terms: dict[str, int]
    phase_peaks: dict[str, int]
    timeline: list[tuple[str, int]] = field(repr=False)
    flops: dict[str, int]
    moved_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """What the card must have: reserved and context."""
        return self.reserved_bytes + self.context_bytes


def summarize(
    stream: Stream, *, context_bytes: int, vocab: int, expandable: bool = False, on_card: bool = True
) -> Simulation:
    """The peaks of a stream under the allocator; the phases named with a trailing `*` are warm-up and not reported.

    Args:
        vocab: size of the logits' last dimension.
        on_card: through CUDA's allocator; else storages count as they are.
    """
    peaks = _walk(stream, on_card=on_card, expandable=expandable)
    steps = {phase: value for phase, value in peaks.allocated.items() if not phase.endswith("*")}
    phase = max(steps, key=lambda name: steps[name])
    terms: Counter[str] = Counter()
    for number in stream.live_at(peaks.event[phase]):
        birth = stream.births[number]
        terms[term_of(birth, vocab)] += birth.num_bytes
    slack = peaks.reserved - sum(terms.values())
    return Simulation(
        allocated_bytes=steps[phase],
        reserved_bytes=peaks.reserved,
        context_bytes=context_bytes,
        phase=phase,
        terms=dict(terms) | {"allocator slack": slack, "context": context_bytes},
        phase_peaks=steps,
        timeline=peaks.curve,
        flops=dict(stream.flops),
        moved_bytes=dict(stream.moved_bytes),
    )


def term_of(birth: Birth, vocab: int) -> str:
    """What a storage is, in the words of the table of terms."""
    if birth.kind is not None:
        return birth.kind
    if birth.operator.startswith("bitsandbytes."):
        return "dequantized weights"
    if birth.phase.startswith("optimizer"):
        return "optimizer temporaries"
    if birth.last == vocab or birth.phase.startswith("loss"):
        return "logits and loss"
    if birth.phase.startswith("backward") and "attention" in birth.operator:
        return "attention temporaries"
    if birth.phase.startswith("backward") and not LAYER_INDEX.search(birth.module + "."):
        return "activation gradients"
    part = next((KINDS[word] for word in re.split(r"\.", birth.module) if word in KINDS), "other")
    return f"activations: {part}"


@dataclass(slots=True)
class _Peaks:
    """Allocated peaks by phase with the event of each, the reserved peak of all, and the curve of allocated."""

    allocated: dict[str, int] = field(default_factory=dict)
    event: dict[str, int] = field(default_factory=dict)
    reserved: int = 0
    curve: list[tuple[str, int]] = field(default_factory=list)


def _walk(stream: Stream, *, on_card: bool, expandable: bool) -> _Peaks:
    """Follow the stream through the allocator, or add it up; reserved counts from the first step on."""
    allocator = CachingAllocator(expandable=expandable)
    starts = dict(stream.phases)
    peaks, phase, held, highest, last = _Peaks(), "", 0, 0, 0
    for index, event in enumerate(stream.events):
        phase = starts.get(index, phase)
        if not on_card:
            held += event.num_bytes or -stream.births[event.tensor].num_bytes
        else:
            if index in stream.emptied:
                allocator.empty_cache()
            if event.num_bytes:
                allocator.allocate(event.tensor, event.num_bytes)
            else:
                allocator.free(event.tensor)
            held = allocator.allocated_bytes
        if held > peaks.allocated.get(phase, -1):
            peaks.allocated[phase], peaks.event[phase] = held, index
        if not phase.startswith("load"):
            peaks.reserved = max(peaks.reserved, allocator.reserved_bytes if on_card else held)
        highest = max(highest, held)
        if abs(held - last) * 1000 > highest:
            peaks.curve.append((phase, held))
            last = held
    return peaks
