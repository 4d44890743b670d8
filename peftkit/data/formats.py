"""Raw rows, however their source names and nests things, -> the canonical rows of a `Shape`.

Which reader fits is decided once a table, by its columns; each row is then read by it, and a row that cannot be read is
an error that names the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peftkit.data.spec import Format
from peftkit.data.table import Row, Shape
from peftkit.errors import DataError, nearest

Reader = Callable[[Row], Row]

TEXT_NAMES = ("text", "sentence", "review", "content", "tweet", "body", "comment", "document", "utterance", "question")
PAIR_NAMES = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
LABEL_NAMES = ("label", "labels", "target", "class", "category", "sentiment", "score", "rating", "stars", "gold_label")
COMPLETION_NAMES = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("source", "target"),
)
ROLES = {
    "messages": {name: name for name in ("system", "user", "assistant", "tool")},
    "sharegpt": {
        **dict.fromkeys(("human", "user"), "user"),
        **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
        **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
        "system": "system",
    },
}
FORMATS: dict[Shape, tuple[Format, ...]] = {
    "classification": ("classification",),
    "conversation": ("messages", "sharegpt", "alpaca", "prompt-completion"),
    "completion": ("alpaca", "prompt-completion", "text"),
}
MAPPABLE: dict[Format, tuple[str, ...]] = {
    "classification": ("text", "text_pair", "label"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output", "system"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}


class RowFault(ValueError):
    """What is wrong with one row; its origin is added where it is known."""


def canonical_rows(
    rows: Sequence[Row],
    origins: Sequence[str],
    shape: Shape,
    *,
    format: Format,
    columns: Mapping[str, str],
    source: str,
    untyped: bool = False,
) -> list[Row]:
    """The rows in the given shape, one for one.

    Args:
        origins: one place a row.
        format: forces one way to read the rows; `auto` decides by the column names.
        columns: canonical name -> the source's name.
        source: what the rows came from, for messages.
        untyped: the source knows only text (csv), so a column of fractional numbers becomes floats.

    Raises:
        DataError: no rows, a column is missing, or a row cannot be read; the first of those is shown, the rest counted.
    """
    if not rows:
        raise DataError(f"{source} is empty: there is no example in it.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    reader = _reader(names, shape, format=format, columns=columns, source=source)
    read: list[Row] = []
    faults: list[str] = []
    for row, origin in zip(rows, origins, strict=True):
        try:
            read.append(reader(row))
        except RowFault as fault:
            faults.append(f"{origin}: {fault}")
    if faults:
        more = f" ({len(faults) - 1} more of the {len(rows)} examples of {source} are faulty.)" if faults[1:] else ""
        raise DataError(f"{faults[0]}{more}")
    return _with_numeric_labels(read, untyped=untyped) if shape == "classification" else read


def _reader(names: list[str], shape: Shape, *, format: Format, columns: Mapping[str, str], source: str) -> Reader:
    """The function that reads one row of this table."""
    if format != "auto" and format not in FORMATS[shape]:
        raise DataError(
            f"data.format={format} does not fit this task, which reads a {shape}. "
            f"Use one of: auto, {', '.join(FORMATS[shape])}; or another task.kind."
        )
    candidates = FORMATS[shape] if format == "auto" else (format,)
    _check_mapping(names, candidates, columns=columns, source=source)
    mapped = [kind for kind in candidates if set(columns) <= set(MAPPABLE[kind])]
    for kind in mapped:
        found = _columns_of(kind, names, columns)
        if found is not None:
            return _READERS[kind, shape](found)
    needed = " or ".join("+".join(f"data.columns.{key}" for key in _REQUIRED[kind]) for kind in mapped)
    raise DataError(f"{source} has no columns for a {shape}; it has: {', '.join(names)}. Set {needed}.")


def _check_mapping(names: list[str], candidates: Sequence[Format], *, columns: Mapping[str, str], source: str) -> None:
    known = list(dict.fromkeys(key for kind in candidates for key in MAPPABLE[kind]))
    for key, name in columns.items():
        if key not in known:
            raise DataError(f"data.columns.{key} means nothing here{nearest(key, known)}. Known: {', '.join(known)}.")
        if name not in names:
            raise DataError(
                f"data.columns.{key} names {name!r}, which {source} does not have{nearest(name, names)}. "
                f"It has: {', '.join(names)}."
            )
    if not any(set(columns) <= set(MAPPABLE[kind]) for kind in candidates):
        raise DataError(f"data.columns mixes the names of several formats: {', '.join(columns)}. Keep those of one.")


_REQUIRED: dict[Format, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}


def _columns_of(kind: Format, names: list[str], columns: Mapping[str, str]) -> dict[str, str] | None:
    """Canonical name -> column for a format, mapped or by its usual names; None when a needed one is not there."""
    lower = {name.lower(): name for name in reversed(names)}
    found = dict(columns)
    for wanted in _guesses(kind, columns):
        if all(alias in lower for alias in wanted.values()):
            found.update({key: lower[alias] for key, alias in wanted.items() if key not in found})
    return found if all(key in found for key in _REQUIRED[kind]) else None


def _guesses(kind: Format, columns: Mapping[str, str]) -> Iterable[dict[str, str]]:
    """Usual names, the surest first; those of one dictionary are taken together or not at all."""
    if kind == "classification":
        if "text" not in columns and "text_pair" not in columns:
            yield from ({"text": first, "text_pair": second} for first, second in PAIR_NAMES)
        yield from ({"text": name} for name in TEXT_NAMES)
        yield from ({"label": name} for name in LABEL_NAMES)
    elif kind == "messages":
        yield from ({"messages": name} for name in ("messages", "conversation", "dialog", "dialogue"))
    elif kind == "prompt-completion":
        if not columns:
            yield from ({"prompt": first, "completion": second} for first, second in COMPLETION_NAMES)
        yield from ({key: key} for key in MAPPABLE[kind])
    elif kind == "text":
        yield from ({"text": name} for name in TEXT_NAMES)
    else:
        yield from ({key: key} for key in MAPPABLE[kind])


def _classification(found: Mapping[str, str]) -> Reader:
    def read(row: Row) -> Row:
        pair = _string(row, found["text_pair"]) if "text_pair" in found else None
        return {"text": _string(row, found["text"]), "text_pair": pair, "label": _label(row, found["label"])}

    return read


def _label(row: Row, name: str) -> str | list[str] | float:
    value = row.get(name)
    if isinstance(value, list):
        labels = [_one_label(item, name) for item in value]
        if len(set(labels)) < len(labels):
            raise RowFault(f"{name!r} names a label twice: {value}. Give the labels that apply, not zeros and ones.")
        return [str(label) for label in labels]
    return _one_label(value, name)


def _one_label(value: Any, name: str) -> str | float:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise RowFault(f"the label is missing ({name!r} is empty)")
    if isinstance(value, int):
        return str(value).lower()
    if isinstance(value, float):
        if math.isinf(value):
            raise RowFault(f"the label {name!r} is not finite: {value}")
        return value
    if isinstance(value, str):
        return _valid(value, name).strip() or _one_label("", name)
    raise RowFault(f"the label {name!r} is a {type(value).__name__}, not a name, a number or a list of names")


def _with_numeric_labels(rows: list[Row], *, untyped: bool) -> list[Row]:
    """Where a column of labels holds fractional numbers, all of them become floats; whole numbers stay names."""
    labels = [row["label"] for row in rows]
    if any(isinstance(label, list) for label in labels) or not (
        untyped or any(isinstance(label, float) for label in labels)
    ):
        return rows
    numbers = [_number(label) for label in labels]
    if any(number is None for number in numbers) or all(
        isinstance(label, str) and _is_whole(label) for label in labels
    ):
        return rows if untyped else [{**row, "label": str(row["label"])} for row in rows]
    return [{**row, "label": number} for row, number in zip(rows, numbers, strict=True)]


def _number(label: str | float) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_whole(label: str) -> bool:
    return label.lstrip("+-").isdigit()


def _turns(kind: Format) -> Callable[[Mapping[str, str]], Reader]:
    def make(found: Mapping[str, str]) -> Reader:
        (name,) = found.values()

        def read(row: Row) -> Row:
            return {"messages": _answered(_messages(row.get(name), name, forced=kind))}

        return read

    return make


def _messages(value: Any, name: str, *, forced: Format) -> list[dict[str, str]]:
    """Turns of either spelling; `forced` only decides which one a message names."""
    if not isinstance(value, list) or not value:
        raise RowFault(f"{name!r} is {_kind_of(value)}, not a list of turns")
    return [_message(turn, number, forced) for number, turn in enumerate(value, start=1)]


def _message(turn: Any, number: int, forced: Format) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RowFault(f"turn {number} is {_kind_of(turn)}, not an object with a role and its content")
    sharegpt = "from" in turn and "role" not in turn
    role_key, content_key, roles = (
        ("from", "value", ROLES["sharegpt"]) if sharegpt else ("role", "content", ROLES["messages"])
    )
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str):
        expected = "'from'" if forced == "sharegpt" else "'role'"
        raise RowFault(f"turn {number} has no {expected}")
    if role not in roles:
        raise RowFault(
            f"turn {number} has the role {role!r}{nearest(role, list(roles))}. Roles are: {', '.join(roles)}."
        )
    if turn.get("tool_calls"):
        raise RowFault(
            f"turn {number} calls tools in 'tool_calls', which is not supported: write the call into the content"
        )
    if isinstance(content, list):
        content = _joined_parts(content, number)
    if not isinstance(content, str):
        raise RowFault(f"the {content_key} of turn {number} ({role}) is {_kind_of(content)}, not a string")
    if not content.strip():
        raise RowFault(f"the {content_key} of turn {number} ({role}) is empty")
    return {"role": roles[role], "content": _valid(content, content_key)}


def _joined_parts(parts: list[Any], number: int) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise RowFault(f"turn {number} has a part that is not text")
    return "".join(text for text in texts if text is not None)


def _answered(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if all(message["role"] != "assistant" for message in messages):
        raise RowFault("there is no assistant turn, so nothing to learn")
    return messages


def _instruction(row: Row, found: Mapping[str, str]) -> str:
    """Alpaca's instruction, and its input below it when there is one."""
    instruction = _string(row, found["instruction"])
    return f"{instruction}\n\n{_string(row, found['input'])}" if row.get(found.get("input", "")) else instruction


def _alpaca_chat(found: Mapping[str, str]) -> Reader:
    def read(row: Row) -> Row:
        has_system = bool(row.get(found.get("system", "")))
        system = [{"role": "system", "content": _string(row, found["system"])}] if has_system else []
        answer = _string(row, found["output"])
        user = {"role": "user", "content": _instruction(row, found)}
        return {"messages": [*system, user, {"role": "assistant", "content": answer}]}

    return read


def _alpaca_completion(found: Mapping[str, str]) -> Reader:
    return lambda row: {"prompt": _instruction(row, found), "completion": _string(row, found["output"])}


def _pair_chat(found: Mapping[str, str]) -> Reader:
    def side(row: Row, key: str, role: str) -> list[dict[str, str]]:
        value = row.get(found[key])
        if isinstance(value, list):
            return _messages(value, found[key], forced="messages")
        return [{"role": role, "content": _string(row, found[key])}]

    return lambda row: {"messages": _answered(side(row, "prompt", "user") + side(row, "completion", "assistant"))}


def _pair_completion(found: Mapping[str, str]) -> Reader:
    def read(row: Row) -> Row:
        prompt = row.get(found["prompt"])
        return {
            "prompt": "" if prompt == "" else _string(row, found["prompt"]),
            "completion": _string(row, found["completion"]),
        }

    return read


def _plain_text(found: Mapping[str, str]) -> Reader:
    return lambda row: {"prompt": "", "completion": _string(row, found["text"])}


_READERS: dict[tuple[Format, Shape], Callable[[Mapping[str, str]], Reader]] = {
    ("classification", "classification"): _classification,
    ("messages", "conversation"): _turns("messages"),
    ("sharegpt", "conversation"): _turns("sharegpt"),
    ("alpaca", "conversation"): _alpaca_chat,
    ("prompt-completion", "conversation"): _pair_chat,
    ("prompt-completion", "completion"): _pair_completion,
    ("alpaca", "completion"): _alpaca_completion,
    ("text", "completion"): _plain_text,
}


def _string(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowFault(f"{name!r} is {_kind_of(value)}, not a string")
    if not value.strip():
        raise RowFault(f"{name!r} is empty")
    return _valid(value, name)


def _valid(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowFault(f"{name!r} holds half a surrogate pair, which is no character") from None
    return text


def _kind_of(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}" if value != [] else "an empty list"
