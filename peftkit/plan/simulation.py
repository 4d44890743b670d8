"""What a simulated run needed: peaks, the moment of the peak, and its terms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from peftkit.backbones.dims import LAYER_INDEX
from peftkit.plan.allocator import CachingAllocator
from peftkit.plan.storages import Birth, Stream

SHOWN = 500
"""A timeline shows changes of more than one part of the peak in so many."""
BETWEEN_STEPS = ("evaluation", "save")
"""Phases behind a step."""
ACTIVATIONS = "activations: "
KINDS = {"self_attn": "attention", "attention": "attention", "mlp": "feed-forward", "intermediate": "feed-forward"}


@dataclass(frozen=True, slots=True)
class Moment:
    """What is allocated at one time of the step, by term."""

    phase: str
    terms: dict[str, int]


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
        first_step_bytes: peak of allocated in the first step, before the optimizer has any state.
        step_bytes: peak of allocated in the last step, without what comes behind it.
        step_terms: what they are.
        timeline: of the last step and the evaluation, at every change of more than a five-hundredth of the peak.
        work: phase, floating-point operations and bytes read and written of what ran, operator by operator.
        flops: floating-point operations by phase.
        moved_bytes: read and written by operators, by phase.
        layers: of the terms the activations, by the index of their layer and by kind.
    """

    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    phase: str
    terms: dict[str, int]
    phase_peaks: dict[str, int]
    first_step_bytes: int
    step_bytes: int
    step_terms: dict[str, int]
    timeline: list[Moment] = field(repr=False)
    work: list[tuple[str, int, int]] = field(repr=False)
    flops: dict[str, int]
    moved_bytes: dict[str, int]
    layers: dict[int, dict[str, int]] = field(default_factory=dict, repr=False)

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
    first = [value for phase, value in peaks.allocated.items() if phase.endswith("*") and phase != "load*"]
    phase = max(steps, key=lambda name: steps[name])
    trained = max((name for name in steps if name not in BETWEEN_STEPS), key=lambda name: steps[name])
    terms = _terms(stream, peaks.event[phase], vocab)
    slack = peaks.reserved - sum(terms.values())
    return Simulation(
        allocated_bytes=steps[phase],
        reserved_bytes=peaks.reserved,
        context_bytes=context_bytes,
        phase=phase,
        terms=terms | {"allocator slack": slack, "context": context_bytes},
        layers=_layers(stream, peaks.event[phase], vocab),
        phase_peaks=steps,
        first_step_bytes=max(first, default=steps[phase]),
        step_bytes=steps[trained],
        step_terms=_terms(stream, peaks.event[trained], vocab),
        timeline=_timeline(stream, vocab, steps[phase]),
        work=[(stream.phases[work.phases - 1][1], work.flops, work.moved_bytes) for work in stream.work if work.phases],
        flops=dict(stream.flops),
        moved_bytes=dict(stream.moved_bytes),
    )


def _terms(stream: Stream, event: int, vocab: int) -> dict[str, int]:
    """Bytes that live behind an event, by what they are."""
    terms: Counter[str] = Counter()
    for number in stream.live_at(event):
        birth = stream.births[number]
        terms[term_of(birth, vocab)] += birth.num_bytes
    return dict(terms)


def _layers(stream: Stream, event: int, vocab: int) -> dict[int, dict[str, int]]:
    """Activations that live behind an event, by layer and kind."""
    layers: dict[int, Counter[str]] = {}
    for number in stream.live_at(event):
        birth = stream.births[number]
        index, term = LAYER_INDEX.search(birth.module + "."), term_of(birth, vocab)
        if index is not None and term.startswith(ACTIVATIONS):
            layers.setdefault(int(index[1]), Counter())[term.removeprefix(ACTIVATIONS)] += birth.num_bytes
    return {layer: dict(layers[layer]) for layer in sorted(layers)}


def term_of(birth: Birth, vocab: int) -> str:
    """What a storage is, in the words of the table of terms."""
    if birth.kind is not None:
        return birth.kind
    return _term(birth.operator, birth.phase, birth.module, birth.last == vocab)


@cache
def _term(operator: str, phase: str, module: str, logits: bool) -> str:
    if operator.startswith("bitsandbytes."):
        return "dequantized weights"
    if phase.startswith("optimizer"):
        return "optimizer temporaries"
    if logits or phase.startswith("loss"):
        return "logits and loss"
    if phase.startswith("backward") and "attention" in operator:
        return "attention temporaries"
    if phase.startswith("backward") and not LAYER_INDEX.search(module + "."):
        return "activation gradients"
    part = next((KINDS[word] for word in module.split(".") if word in KINDS), "other")
    return ACTIVATIONS + part


@dataclass(slots=True)
class _Peaks:
    """Allocated peaks by phase with the event of each, and the reserved peak of all."""

    allocated: dict[str, int] = field(default_factory=dict)
    event: dict[str, int] = field(default_factory=dict)
    reserved: int = 0


def _walk(stream: Stream, *, on_card: bool, expandable: bool) -> _Peaks:
    """Follow the stream through the allocator, or add it up; reserved counts from the first step on."""
    allocator = CachingAllocator(expandable=expandable)
    starts = dict(stream.phases)
    peaks, phase, held = _Peaks(), "", 0
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
    last = stream.phases[-1][1]  # may be without an event
    peaks.allocated.setdefault(last, held)
    peaks.event.setdefault(last, len(stream.events) - 1)
    return peaks


def _timeline(stream: Stream, vocab: int, peak: int) -> list[Moment]:
    """What lives through the last step, by term; small changes are left out, and what dies after the last birth."""
    starts = dict(stream.phases)
    end = max((index for index, event in enumerate(stream.events) if event.num_bytes), default=0)
    terms: Counter[str] = Counter()
    moments: list[Moment] = []
    phase, changed = "", 0
    for index, event in enumerate(stream.events[: end + 1]):
        phase = starts.get(index, phase)
        birth = stream.births[event.tensor]
        terms[term_of(birth, vocab)] += birth.num_bytes if event.num_bytes else -birth.num_bytes
        changed += birth.num_bytes
        if not phase.endswith("*") and changed * SHOWN > peak:
            moments.append(Moment(phase, dict(+terms)))
            changed = 0
    return moments
