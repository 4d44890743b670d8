"""How rows of the usual formats are read, and how faulty ones are named."""

from __future__ import annotations

from typing import Any

import pytest

from peftkit.data.formats import canonical_rows
from peftkit.data.table import Row, Shape
from peftkit.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


def read(rows: list[Any], shape: Shape, **changes: Any) -> list[Row]:
    origins = [f"train.jsonl:{number}" for number in range(1, len(rows) + 1)]
    return canonical_rows(rows, origins, shape, **{"format": "auto", "columns": {}, "source": "train.jsonl", **changes})


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "id": 3},
        {"conversations": CHAT["messages"]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
        {"question": "Q", "answer": "A"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                {**CHAT["messages"][1], "name": "x"},
            ]
        },
    ],
)
def test_chat_formats_are_detected_and_come_to_the_same(row: Row) -> None:
    assert read([row], "conversation") == [CHAT]


def test_alpaca_puts_the_input_below_the_instruction_and_the_system_first() -> None:
    row = {"instruction": "Sum up", "input": "Long text", "output": "Short", "system": "Be brief"}
    (chat,) = read([row], "conversation")
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Sum up\n\nLong text"},
        {"role": "assistant", "content": "Short"},
    ]
    assert read([row], "completion") == [{"prompt": "Sum up\n\nLong text", "completion": "Short"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "P", "completion": "C"}, {"prompt": "P", "completion": "C"}),
        ({"prompt": "", "completion": "C"}, {"prompt": "", "completion": "C"}),
        ({"source": "P", "target": "C"}, {"prompt": "P", "completion": "C"}),
        ({"text": "Plain"}, {"prompt": "", "completion": "Plain"}),
    ],
)
def test_completion_formats_are_detected(row: Row, expected: Row) -> None:
    assert read([row], "completion") == [expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "T", "label": "x"}, ("T", None, "x")),
        ({"Review": "T", "Stars": 4}, ("T", None, "4")),
        ({"text": "T", "label": True}, ("T", None, "true")),
        ({"premise": "A", "hypothesis": "B", "label": "x", "idx": 0}, ("A", "B", "x")),
        ({"question": "A", "sentence": "B", "label": "x"}, ("A", "B", "x")),
        ({"text": "T", "labels": ["b", "a"]}, ("T", None, ["b", "a"])),
        ({"text": "T", "labels": []}, ("T", None, [])),
        ({"text": "T", "score": 0.5}, ("T", None, 0.5)),
    ],
)
def test_classification_columns_are_known_by_their_usual_names(row: Row, expected: tuple[Any, ...]) -> None:
    assert read([row], "classification") == [dict(zip(("text", "text_pair", "label"), expected, strict=True))]


def test_mapping_beats_the_usual_names() -> None:
    row = {"text": "no", "body": "T", "also": "P", "label": "no", "mark": "x"}
    columns = {"text": "body", "text_pair": "also", "label": "mark"}
    assert read([row], "classification", columns=columns) == [{"text": "T", "text_pair": "P", "label": "x"}]
    assert read([{**CHAT, "talk": CHAT["messages"][:2]}], "conversation", columns={"messages": "talk"}) == [CHAT]
    assert read([{"q": "Q", "a": "A"}], "conversation", columns={"prompt": "q", "completion": "a"}) == [CHAT]


def test_fractional_labels_make_all_numbers_floats_and_whole_ones_stay_names() -> None:
    def labels(*values: Any, untyped: bool = False) -> list[Any]:
        rows = read([{"text": "T", "label": value} for value in values], "classification", untyped=untyped)
        return [row["label"] for row in rows]

    assert labels(1, 2.5) == [1.0, 2.5]
    assert labels(1, 2) == ["1", "2"]
    assert labels("1.5", "2") == ["1.5", "2"]
    assert labels("1.5", "2", untyped=True) == [1.5, 2.0]
    assert labels("1", "2", untyped=True) == ["1", "2"]
    assert labels("1.5", "good", untyped=True) == ["1.5", "good"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (
            {"messages": [{"role": "asistant", "content": "A"}]},
            "turn 1 has the role 'asistant'; did you mean 'assistant'",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, "the content of turn 1 (user) is empty"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "there is no assistant turn"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content of turn 1 (user) is of type int, not a string"),
        ({"messages": [{"role": "assistant", "content": None}]}, "the content of turn 1 (assistant) is missing"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "which is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 has a part that is not text"),
        ({"messages": [{"content": "A"}]}, "turn 1 has no 'role'"),
        ({"messages": ["A"]}, "turn 1 is of type str"),
        ({"messages": "A"}, "'messages' is of type str, not a list of turns"),
        ({"messages": []}, "'messages' is an empty list"),
        ({}, "'messages' is missing"),
        ({"messages": [{"role": "assistant", "content": "\ud83d"}]}, "half a surrogate pair"),
    ],
)
def test_faulty_conversation_is_named_with_its_origin(row: Row, fault: str) -> None:
    with pytest.raises(DataError) as raised:
        read([CHAT, row, CHAT], "conversation")
    assert str(raised.value).startswith("train.jsonl:2: ")
    assert fault in str(raised.value)
    assert "more of" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "", "label": "x"}, "'text' is empty"),
        ({"text": 7, "label": "x"}, "'text' is of type int, not a string"),
        ({"text": "T", "label": None}, "the label is missing"),
        ({"text": "T"}, "the label is missing"),
        ({"text": "T", "label": "  "}, "the label is missing"),
        ({"text": "T", "label": float("nan")}, "the label is missing"),
        ({"text": "T", "label": float("inf")}, "not finite"),
        ({"text": "T", "label": {"a": 1}}, "is a dict"),
        ({"text": "T", "label": [0, 1, 0]}, "names a label twice"),
    ],
)
def test_faulty_classification_example_is_named_with_its_origin(row: Row, fault: str) -> None:
    with pytest.raises(DataError) as raised:
        read([{"text": "T", "label": "x"}, row], "classification")
    assert str(raised.value).startswith("train.jsonl:2: ")
    assert fault in str(raised.value)


def test_first_fault_is_shown_and_the_others_counted() -> None:
    bad: Row = {"messages": []}
    with pytest.raises(DataError, match=r"^train.jsonl:2: .*\(2 more of the 5 examples of train.jsonl are faulty.\)$"):
        read([CHAT, bad, CHAT, bad, bad], "conversation")


@pytest.mark.parametrize(
    ("rows", "shape", "changes", "message"),
    [
        ([{"a": 1, "b": 2}], "classification", {}, "it has: a, b. Set data.columns.text+data.columns.label"),
        ([{"text": "T", "c": 2}], "classification", {}, "it has: text, c. Set data.columns.text+data.columns.label"),
        ([{"body": "T", "label": "x"}], "classification", {"columns": {"text": "bdy"}}, "names 'bdy', .* mean 'body'"),
        ([{"text": "T", "label": "x"}], "classification", {"columns": {"txt": "text"}}, "mean 'text'"),
        ([CHAT], "conversation", {"columns": {"messages": "messages", "prompt": "messages"}}, "mixes"),
        ([CHAT], "conversation", {"format": "alpaca"}, r"Set data.columns.instruction\+data.columns.output"),
        ([CHAT], "completion", {"format": "messages"}, "data.format=messages does not fit"),
        ([], "completion", {}, "train.jsonl is empty"),
    ],
)
def test_faults_of_the_whole_source_name_the_key_to_set(
    rows: list[Row], shape: Shape, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message.replace("+", r"\+") if "\\" not in message else message):
        read(rows, shape, **changes)
