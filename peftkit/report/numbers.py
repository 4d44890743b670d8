"""Every number of every cell, a line each: as CSV and as Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.files import write_bytes, write_text
from peftkit.report.rows import CellRow

PARTS = (
    "metrics",
    "validation_metrics",
    "parameters",
    "memory",
    "throughput",
    "inference",
    "energy",
    "loss",
    "guards",
    "recipe",
)
"""Of a record, in the order of their columns. What a record lacks has none."""


def write_csv(rows: Sequence[CellRow], path: Path) -> None:
    """One line a cell: how it ended, every setting of its recipe and every number of its record, dotted.

    What was not measured is empty.

    Raises:
        OutputError: `path` cannot be written.
    """
    flat = [_flat_row(row) for row in rows]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _columns(flat), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(path, stream.getvalue())


def write_parquet(rows: Sequence[CellRow], path: Path) -> None:
    """The table of `write_csv`, typed: integers, floats, booleans; all else, and what differs in kind, is text.

    What was not measured is null.

    Raises:
        OutputError: `path` cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    flat = [_flat_row(row) for row in rows]
    table = pyarrow.table({name: _typed([row.get(name) for row in flat]) for name in _columns(flat)})
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    write_bytes(path, stream.getvalue())


def _columns(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every name once: what was measured first, then the recipe's."""
    columns = list(dict.fromkeys(key for row in flat for key in row))
    return sorted(columns, key=lambda key: key.startswith("recipe."))


def _typed(values: Sequence[Any]) -> Any:
    """One column of one type."""
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    if kinds in ({bool}, {int}):
        return pyarrow.array(values, type=pyarrow.bool_() if kinds == {bool} else pyarrow.int64())
    if kinds and kinds <= {int, float}:
        return pyarrow.array([None if value is None else float(value) for value in values], type=pyarrow.float64())
    return pyarrow.array([None if value is None else str(value) for value in values], type=pyarrow.string())


def _flat_row(row: CellRow) -> dict[str, Any]:
    flat: dict[str, Any] = {
        "variant": row.variant,
        "seed": row.seed,
        "status": row.status,
        "reason": row.reason,
        "folder": row.folder.name,
    }
    if row.outside is not None:
        flat["source"] = row.outside.source
    content = row.content()
    if not content:
        return flat
    flat |= {"label": content["label"], "recipe_digest": content["recipe_digest"]}
    if "wall_seconds" in content:
        flat["wall_seconds"] = content["wall_seconds"]
    target_seconds = row.target_seconds()
    if target_seconds is not None:
        flat["target_seconds"] = target_seconds
    for part in PARTS:
        flat |= _flattened(content.get(part, {}), f"{part}.")
    return flat


def _flattened(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat
