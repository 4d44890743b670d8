"""The real counterpart of a simulated step: peak bytes of all tensors while some steps run on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from peftkit.plan.kinds import tag_state, tag_weights
from peftkit.plan.storages import StorageTracker, Stream
from peftkit.train.optimizers import Updates


@dataclass(slots=True)
class TensorPeak:
    """Filled in at the end of the watched step."""

    num_bytes: int = 0


@contextmanager
def watching_tensors(model: nn.Module, updates: Updates) -> Iterator[TensorPeak]:
    """Count the storages that are alive at once while the body runs, those of the model and the optimizer included.

    It runs slower, and the same.
    """
    peak = TensorPeak()
    with StorageTracker() as tracker:
        tag_weights(tracker, model, adapted=False)
        tag_state(tracker, updates.state_dict())
        yield peak
    peak.num_bytes = _peak(tracker.stream)


def _peak(stream: Stream) -> int:
    held = highest = 0
    for event in stream.events:
        held += event.num_bytes or -stream.births[event.tensor].num_bytes
        highest = max(highest, held)
    return highest
