"""When memory runs out: what is tried again in smaller forwards, and what a person is told where that cannot help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from peftkit.errors import OutOfMemory

if TYPE_CHECKING:
    from peftkit.data.batching import Batch
    from peftkit.data.features import Features
    from peftkit.recipe import Training
    from peftkit.train.fastpath import FastPath

SAID_BY_TORCH = (
    "can't allocate memory",  # host memory
    "not enough memory",  # host memory on Windows
    "CUDA error: out of memory",  # pinned host memory, a context
    "CUBLAS_STATUS_ALLOC_FAILED",  # the workspace of matrix products
)
"""How a plain RuntimeError says that memory ran out."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Memory ran out, and the words in which that was said."""

    reason: str


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The most that one forward takes; an example longer than a number of tokens goes alone."""

    count: int
    unit: Literal["examples", "tokens"]

    @classmethod
    def of(cls, setting: int | str, *, auto_tokens: int) -> MicroBatch:
        """What the recipe's `training.micro_batch` says, `auto` being so many tokens."""
        if isinstance(setting, int):
            return cls(setting, "examples")
        return cls(auto_tokens if setting == "auto" else int(setting.split()[0]), "tokens")

    @property
    def setting(self) -> int | str:
        """The same, as a recipe says it."""
        return self.count if self.unit == "examples" else f"{self.count} tokens"

    def cut(self, fast: FastPath, examples: Sequence[Features]) -> list[Batch]:
        """The forwards that these examples are computed in."""
        if self.unit == "examples":
            return list(fast.batches(examples, max_examples=self.count))
        return list(fast.batches(examples, max_tokens=self.count))

    def halved(self, batches: Sequence[Batch], fault: Exhausted, *, where: str, remedy: str) -> MicroBatch:
        """Half of the largest of these forwards: of what ran, so that no attempt is the same as the one before.

        Raises:
            OutOfMemory: each had one example.
        """
        several = [batch for batch in batches if len(batch.rows) > 1]
        sizes = [len(batch.rows) if self.unit == "examples" else batch.input_ids.numel() for batch in several]
        if not sizes:
            raise OutOfMemory(f"{where} does not fit with one example a forward: {fault.reason}. {remedy}")
        return MicroBatch((max(sizes) + 1) // 2, self.unit)


def attempt(work: Callable[[], Result]) -> Result | Exhausted:
    """What the work gives, or that memory ran out in it; then nothing that the work made is referred to any more."""
    try:
        return work()
    except (MemoryError, RuntimeError) as fault:
        if not is_out_of_memory(fault):
            raise
        return Exhausted(_said(fault))  # the fault's frames hold the graph, and they go with it


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether the device or the machine ran out of memory."""
    if isinstance(fault, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(fault, RuntimeError) and any(words in str(fault) for words in SAID_BY_TORCH)


@contextmanager
def explained(where: str, remedy: str) -> Iterator[None]:
    """Running out of memory in here is an `OutOfMemory` that says where, and what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if not is_out_of_memory(fault):
            raise
        raise OutOfMemory(f"{where} ran out of memory: {_said(fault)}. {remedy}") from fault


def remedy(training: Training) -> str:
    """What to try when the smallest forward does not fit."""
    recompute = () if training.checkpointing == "all" else ("training.checkpointing=all",)
    tried = (*recompute, f"training.max_tokens below {training.max_tokens}", "backbone.quantization=nf4")
    return f"Try {', '.join(tried)} or a smaller backbone; `peftkit plan RECIPE --fit` searches for what fits."


def _said(fault: BaseException) -> str:
    return (str(fault) or type(fault).__name__).rstrip(". \n")
