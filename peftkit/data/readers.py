"""Files -> raw rows with their place. Every fault names the file, and the line where there is one.

Text files are read here and not by `datasets`: its readers fix a schema by the first rows (a key that only later lines
have is an error), and take a csv row with too many fields for an index. Parquet and the hub have a schema, and are its.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.data.quiet import quiet_datasets
from peftkit.data.table import Row
from peftkit.errors import DataError


@dataclass(frozen=True, slots=True)
class Raw:
    """Rows as their source has them.

    Attributes:
        origins: one place a row.
        name: what they came from, for messages.
        untyped: the source knows only text.
    """

    rows: list[Row]
    origins: list[str]
    name: str
    untyped: bool = False


def read_file(path: Path) -> Raw:
    """All rows of one file, by its suffix.

    Raises:
        DataError: unknown suffix, no permission, not UTF-8, or malformed.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{path} has the suffix {suffix or '(none)'}, which says no known format. Known: {', '.join(READERS)}."
        )
    try:
        numbered = READERS[suffix](path)
    except UnicodeDecodeError as fault:
        raise DataError(f"{path} is not UTF-8 (byte {fault.start}: {fault.reason}). Save it as UTF-8.") from fault
    except OSError as fault:
        raise DataError(f"{path} cannot be read: {fault.strerror or fault}.") from fault
    rows = [row for _, row in numbered]
    return Raw(rows, [f"{path}:{number}" for number, _ in numbered], str(path), untyped=suffix in (".csv", ".tsv"))


Numbered = Sequence[tuple[int, Row]]


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _csv(path: Path) -> Numbered:
    """Data rows, counted from 1 below the header; a quoted field may hold line breaks."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        table = [fields for fields in reader if fields]
    except csv.Error as fault:
        raise DataError(
            f'{path}: line {reader.line_num}: {fault}. Quote fields as "...", quotes within as "".'
        ) from fault
    header = [name.strip() for name in table[0]] if table else []
    if len(set(header)) < len(header):
        raise DataError(f"{path}: a column name appears twice in the header: {', '.join(header)}. Rename one.")
    for number, fields in enumerate(table[1:], start=1):
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{number}: {len(fields)} fields where the header has {len(header)} ({', '.join(header)}). "
                f"Quote the fields that hold {'a tab' if delimiter == chr(9) else 'commas'}."
            )
    return [(number, dict(zip(header, fields, strict=True))) for number, fields in enumerate(table[1:], start=1)]


def _json_lines(path: Path) -> Numbered:
    # split at "\n" alone: str.splitlines also cuts at U+2028, which JSON strings may hold
    lines = enumerate(_text(path).split("\n"), start=1)
    return [(number, _json_row(line, f"{path}:{number}")) for number, line in lines if line.strip()]


def _json_row(line: str, origin: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise DataError(
            f"{origin}: not JSON: {fault.msg} at column {fault.colno}. Each line is one JSON object."
        ) from fault
    except RecursionError as fault:
        raise DataError(f"{origin}: JSON nested too deeply to read.") from fault
    return _object(row, origin)


def _object(row: Any, origin: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f'{origin}: a JSON {type(row).__name__} where an object was expected, such as {{"text": ...}}.')
    return row


def _json(path: Path) -> Numbered:
    """An array of objects, an object with one such array in it, or JSON lines."""
    text = _text(path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as fault:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if not text.strip():
            return []
        if _is_json_object(first):
            return _json_lines(path)
        raise DataError(f"{path}: line {fault.lineno}, column {fault.colno}: not JSON: {fault.msg}.") from fault
    except RecursionError as fault:
        raise DataError(f"{path}: JSON nested too deeply to read.") from fault
    if isinstance(document, dict):
        lists = [
            value for value in document.values() if isinstance(value, list) and all(isinstance(v, dict) for v in value)
        ]
        document = lists[0] if len(lists) == 1 and not _is_row(document) else [document]
    if not isinstance(document, list):
        raise DataError(f"{path} holds a JSON {type(document).__name__} where an array of objects was expected.")
    return [(number, _object(row, f"{path}:{number}")) for number, row in enumerate(document, start=1)]


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _is_row(document: Row) -> bool:
    """Whether an object with a list of objects in it is one conversation, not a file of examples."""
    return any(name in document for name in ("messages", "conversations"))


def _lines(path: Path) -> Numbered:
    lines = enumerate(_text(path).split("\n"), start=1)
    return [(number, {"text": line.rstrip("\r")}) for number, line in lines if line.strip()]


def _parquet(path: Path) -> Numbered:
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    try:
        with quiet_datasets() as scratch:
            rows = dataset_rows(Dataset.from_parquet(str(path), cache_dir=scratch, keep_in_memory=True))
    except (DatasetsError, ValueError) as fault:
        if str(fault).endswith("corresponds to no data!"):
            return []
        raise DataError(f"{path} cannot be read as Parquet: {fault.__cause__ or fault}") from fault
    return list(enumerate(rows, start=1))


def dataset_rows(dataset: Any) -> list[Row]:
    """The rows of a `datasets.Dataset`, with the names of class labels in place of their numbers."""
    from datasets import ClassLabel, LargeList, List

    rows: list[Row] = dataset.to_list()
    for name, feature in dataset.features.items():
        label = feature.feature if isinstance(feature, (List, LargeList)) else feature
        if isinstance(label, ClassLabel):
            rows = [{**row, name: _named(row[name], label)} for row in rows]
    return rows


def _named(value: Any, label: Any) -> Any:
    """The name of a class; none where the number says that there is no label (-1, as hub test splits have it)."""
    if isinstance(value, list):
        return [_named(item, label) for item in value]
    return None if value is None or value < 0 else label.int2str(value)


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _lines,
}
