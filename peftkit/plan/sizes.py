"""Examples as far as they decide memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peftkit.data.features import Features


class Size(NamedTuple):
    """An example's tokens, and how many of them carry loss."""

    tokens: int
    labelled: int

    def cut(self, limit: int) -> Size:
        """The example with no more tokens than that."""
        return Size(min(self.tokens, limit), min(self.labelled, max(1, limit - 1)))


def sizes_of(features: Sequence[Features]) -> tuple[Size, ...]:
    """The sizes of real examples."""
    return tuple(Size(len(example), example.loss_units) for example in features)


def fully_labelled(lengths: Sequence[int]) -> tuple[Size, ...]:
    """Examples of so many tokens each, of which all but the first carry loss."""
    return tuple(Size(length, max(1, length - 1)) for length in lengths)
