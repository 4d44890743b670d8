"""Per-example predictions of many cells, small enough to travel inside a page.

What all cells share (row numbers, right answers) is kept once, in a set; a cell adds its columns, base64 of
little-endian numbers. Probabilities have one byte (steps of 1/255), losses two (steps of the cell's largest / 65535).
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.folder import HEAD_NAME
from peftkit.record import PREDICTIONS_NAME, RunRecord, read_predictions
from peftkit.report.rows import CellRow

Columns = dict[str, Any]
BUDGET_BYTES = 5 * 2**20
"""Columns of all cells together, before base64. Above it every k-th example is kept, the same of every cell."""
MOST_LABELS = 64
"""A label set is kept as bits up to so many labels; with more, only whether it is right."""


@dataclass(frozen=True, slots=True)
class Examples:
    """The encoded predictions of a report.

    Attributes:
        sets: what cells share: kind of task, rows, right answers, names of the labels.
        columns: a cell's own columns and the index of its set, by place in the rows; None without predictions.
        stride: one example in so many is kept.
    """

    sets: list[Columns]
    columns: list[Columns | None]
    stride: int


def collect_examples(rows: Sequence[CellRow]) -> Examples:
    """The predictions of every cell that has some it can be compared by."""
    stride = _stride(rows)
    sets: dict[str, int] = {}
    shared: list[Columns] = []
    columns: list[Columns | None] = []
    for row in rows:
        encoded = _encode_cell(row, stride)
        if encoded is None:
            columns.append(None)
            continue
        common, own = encoded
        key = json.dumps({name: value for name, value in common.items() if name != "names"}, sort_keys=True)
        place = sets.setdefault(key, len(shared))
        if place == len(shared):
            shared.append(common)
        elif not shared[place]["names"]:  # a cell without an artifact does not know the labels' names
            shared[place]["names"] = common["names"]
        columns.append({"set": place} | own)
    return Examples(shared, columns, stride)


def _stride(rows: Sequence[CellRow]) -> int:
    """How many examples there are to each one kept; at most four bytes an example and cell are assumed."""
    sizes = (metric.n for row in rows if row.record for metric in list(row.record.metrics.values())[:1])
    return max(1, -(-4 * sum(sizes) // BUDGET_BYTES))


def _encode_cell(row: CellRow, stride: int) -> tuple[Columns, Columns] | None:
    """What is shared and what is the cell's own; None for predictions that are absent or of an unknown shape."""
    if row.record is None or not (row.folder / PREDICTIONS_NAME).is_file():
        return None
    try:
        found = sorted(read_predictions(row.folder), key=lambda example: int(example["row"]))
        kept = [example for example in found if example["row"] % stride == 0]
        if not kept:
            return None
        common, own = _encoder(kept[0])(kept)
        places = [int(example["row"]) for example in kept]
        in_order = places == list(range(0, stride * len(places), stride))
        common |= {"size": len(kept), "names": _label_names(row.folder, row.record)}
        return common | ({} if in_order else {"rows": _packed("I", places)}), own
    except (OSError, KeyError, TypeError, ValueError, IndexError, struct.error):
        return None


def _encoder(example: Columns) -> Callable[[Sequence[Columns]], tuple[Columns, Columns]]:
    if "tokens" in example:
        return _encode_language
    if isinstance(example["prediction"], list):
        return _encode_label_sets
    return _encode_numbers if isinstance(example["prediction"], float) else _encode_labels


def _encode_labels(examples: Sequence[Columns]) -> tuple[Columns, Columns]:
    """Single-label: the answer, its probability and that of the right label."""
    labels = [example["label"] for example in examples]
    answers = [example["prediction"] for example in examples]
    width = "B" if max(*labels, *answers) < 256 else "H"
    own = {
        "answer": _packed(width, answers),
        "confidence": _packed("B", [_byte(e["scores"][e["prediction"]]) for e in examples]),
        "truth": _packed("B", [_byte(e["scores"][e["label"]]) for e in examples]),
    }
    return {"kind": "label", "width": width, "label": _packed(width, labels)}, own


def _encode_label_sets(examples: Sequence[Columns]) -> tuple[Columns, Columns]:
    """Multi-label: which labels are given, or only whether all are right; and the loss."""
    labels = [[int(flag) for flag in example["label"]] for example in examples]
    answers = [[int(flag) for flag in example["prediction"]] for example in examples]
    own = _losses([float(example["loss"]) for example in examples])
    count = len(labels[0])
    if count > MOST_LABELS:
        right = [int(label == answer) for label, answer in zip(labels, answers, strict=True)]
        return {"kind": "right"}, own | {"right": _packed("B", right)}
    return {"kind": "labels", "count": count, "label": _bits(labels)}, own | {"answer": _bits(answers)}


def _encode_numbers(examples: Sequence[Columns]) -> tuple[Columns, Columns]:
    """Regression: the right number and the answer."""
    labels = [float(example["label"]) for example in examples]
    return {"kind": "number", "label": _packed("f", labels)}, {
        "answer": _packed("f", [float(example["prediction"]) for example in examples])
    }


def _encode_language(examples: Sequence[Columns]) -> tuple[Columns, Columns]:
    """Tokens: how many carry loss, how many of them are right, and their mean loss."""
    tokens = [example["tokens"] for example in examples]
    width = "H" if max(tokens) < 2**16 else "I"
    own = _losses([example["loss"] / max(1, example["tokens"]) for example in examples])
    own["correct"] = _packed(width, [example["correct"] for example in examples])
    return {"kind": "tokens", "width": width, "tokens": _packed(width, tokens)}, own


def _losses(losses: Sequence[float]) -> Columns:
    largest = max(losses)
    step = largest / 65535 if largest > 0 else 1.0
    return {"loss": _packed("H", [round(max(0.0, loss) / step) for loss in losses]), "loss_step": step}


def _byte(probability: float) -> int:
    return round(255 * min(1.0, max(0.0, probability)))


def _bits(flags: Sequence[Sequence[int]]) -> str:
    """One row of whole bytes an example; label i is bit i % 8 of byte i // 8."""
    width = -(-len(flags[0]) // 8)
    numbers = (sum(1 << i for i, flag in enumerate(row) if flag) for row in flags)
    return base64.b64encode(b"".join(number.to_bytes(width, "little") for number in numbers)).decode()


def _packed(kind: str, values: Sequence[float]) -> str:
    """Base64 of little-endian numbers: B, H, I unsigned of 1, 2, 4 bytes; f float of 4."""
    return base64.b64encode(struct.pack(f"<{len(values)}{kind}", *values)).decode()


def _label_names(folder: Path, record: RunRecord) -> list[str]:
    """The labels in order: those of the recipe, else of the head beside the artifact; empty where neither tells."""
    asked = record.recipe.get("task", {}).get("labels")
    if asked:
        return [str(name) for name in asked]
    for artifact in record.artifacts.values():
        path = folder / artifact / HEAD_NAME
        if path.is_file():
            return [str(name) for name in json.loads(path.read_text(encoding="utf-8")).get("labels", [])]
    return []
