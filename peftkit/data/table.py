"""Canonical rows with their origin: what every data source becomes and every task reads.

Row shapes, by `Shape`:
    classification   {"text": str, "text_pair": str | None, "label": str | list[str] | float | None}
    conversation     {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": str}, ...]}
    completion       {"prompt": str, "completion": str}; plain text has an empty prompt
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["classification", "conversation", "completion"]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one shape, and for each the place it came from (`train.jsonl:12`, `builtin:movie-sentiment/train#7`).

    Attributes:
        rows: canonical rows, in order.
        origins: one place a row, for messages to people.
        digest: SHA-256 over the rows' content; two tables with the same rows have the same digest.
    """

    rows: Sequence[Row]
    origins: Sequence[str]
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


@dataclass(frozen=True, slots=True)
class Splits:
    """The three splits of a run; validation and test may be absent."""

    train: Table
    validation: Table | None
    test: Table | None
