"""Sources of every kind become tables; every way a source can be wrong is one message that names it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from peftkit.data.load import load_splits, read_hub, row_digest
from peftkit.data.quiet import quiet_datasets
from peftkit.data.spec import DataSpec
from peftkit.data.table import Shape, Splits, Table
from peftkit.errors import DataError

ROWS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(40)]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path: Path, rows: list[Any]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def load(shape: Shape = "classification", *, seed: int = 0, **fields: Any) -> Splits:
    return load_splits(DataSpec(**fields), shape, seed=seed)


def texts(table: Table | None) -> list[str]:
    assert table is not None
    return [row["text"] for row in table]


def parquet(path: Path, rows: list[dict[str, Any]], **features: Any) -> str:
    from datasets import Dataset, Features

    with quiet_datasets():
        Dataset.from_list(rows, features=Features(features) if features else None).to_parquet(str(path))
    return str(path)


def test_csv_rows_keep_quotes_line_breaks_and_words_that_look_like_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", '\ufefftext,label\n"one, ""two""\nthree",1\nNA,0\n\nnull,1\n')
    table = load(train=source).train
    assert table.rows == [
        {"text": 'one, "two"\nthree', "text_pair": None, "label": "1"},
        {"text": "NA", "text_pair": None, "label": "0"},
        {"text": "null", "text_pair": None, "label": "1"},
    ]
    assert table.origins == [f"{source}:1", f"{source}:2", f"{source}:3"]


def test_every_file_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}]
    sources = [
        write(tmp_path / "a.csv", "text,label\none,x\ntwo,y\n"),
        write(tmp_path / "a.tsv", "text\tlabel\none\tx\ntwo\ty\n"),
        write(tmp_path / "a.json", json.dumps(rows, indent=1)),
        write(tmp_path / "b.json", json.dumps({"version": 1, "data": rows})),
        jsonl(tmp_path / "c.json", rows),
        jsonl(tmp_path / "a.jsonl", rows),
        parquet(tmp_path / "a.parquet", rows),
    ]
    tables = [load(train=source).train for source in sources]
    assert tables[0].rows == [{"text_pair": None, **row} for row in rows]
    assert len({table.digest for table in tables}) == 1
    assert [list(table.rows) for table in tables] == [tables[0].rows] * len(sources)


def test_json_lines_may_differ_in_their_keys_and_count_blank_lines(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", '{"text": "a", "label": "x"}\n\n{"label": "y", "text": "b\u2028c", "more": [1]}\r\n'
    )
    table = load(train=source).train
    assert texts(table) == ["a", "b\u2028c"]
    assert table.origins == [f"{source}:1", f"{source}:3"]


def test_text_file_is_a_completion_a_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "one\r\n\n  two\n")
    table = load("completion", train=source).train
    assert table.rows == [{"prompt": "", "completion": "one"}, {"prompt": "", "completion": "  two"}]
    assert table.origins == [f"{source}:1", f"{source}:3"]


def test_class_numbers_of_datasets_become_names_and_minus_one_is_a_missing_label(tmp_path: Path) -> None:
    from datasets import ClassLabel, List, Value

    names = ClassLabel(names=["no", "yes"])
    single = parquet(tmp_path / "a.parquet", [{"text": "a", "label": 1}], text=Value("string"), label=names)
    multi = parquet(tmp_path / "b.parquet", [{"text": "a", "label": [1, 0]}], text=Value("string"), label=List(names))
    hidden = parquet(tmp_path / "c.parquet", [{"text": "a", "label": -1}], text=Value("string"), label=names)
    assert load(train=single).train.rows[0]["label"] == "yes"
    assert load(train=multi).train.rows[0]["label"] == ["yes", "no"]
    with pytest.raises(DataError, match=r"c\.parquet:1: the label is missing"):
        load(train=hidden)


def test_folder_gives_each_slot_the_files_named_for_it(tmp_path: Path) -> None:
    for name, part in (("train-0", ROWS[:3]), ("train-1", ROWS[3:5]), ("dev", ROWS[5:6]), ("test", ROWS[6:8])):
        jsonl(tmp_path / "set" / f"{name}.jsonl", part)
    folder = str(tmp_path / "set")
    splits = load(train=folder, validation=folder, test=folder)
    assert texts(splits.train) == [row["text"] for row in ROWS[:5]]
    assert texts(splits.validation) == ["text 5"]
    assert texts(splits.test) == ["text 6", "text 7"]


def test_folder_without_split_names_and_glob_give_all_their_files_in_order(tmp_path: Path) -> None:
    jsonl(tmp_path / "set" / "b.jsonl", ROWS[2:4])
    jsonl(tmp_path / "set" / "deep" / "a.jsonl", ROWS[4:5])
    jsonl(tmp_path / "set" / "a.jsonl", ROWS[:2])
    write(tmp_path / "set" / "README.md", "about")
    assert texts(load(train=str(tmp_path / "set")).train) == [f"text {number}" for number in range(5)]
    assert texts(load(train=str(tmp_path / "set" / "*.jsonl")).train) == [f"text {number}" for number in range(4)]
    assert texts(load(train=str(tmp_path / "**" / "a.jsonl")).train) == ["text 0", "text 1", "text 4"]


def test_relative_path_is_shown_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS[:1])
    monkeypatch.chdir(tmp_path)
    assert load(train="train.jsonl").train.origins == ["train.jsonl:1"]


def test_builtin_gives_the_split_of_its_slot() -> None:
    splits = load(train="builtin:nyt-sentiment", validation="builtin:nyt-sentiment", test="builtin:nyt-sentiment")
    assert splits.validation is not None
    assert splits.test is not None
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [2343, 294, 294]
    assert splits.test.origins[7] == "builtin:nyt-sentiment/test#7"
    assert load("conversation", train="builtin:chatterbot-en").train.rows[0].keys() == {"messages"}


def test_fraction_holds_out_its_share_of_every_label_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    rows = ROWS[::2] + ROWS[1::4]  # 20 a, 10 b
    forwards, backwards = jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", rows[::-1])
    first, second = load(train=forwards, validation=0.2), load(train=backwards, validation=0.2)
    assert first.validation is not None
    assert Counter(row["label"] for row in first.validation) == {"a": 4, "b": 2}
    assert set(texts(first.train)) | set(texts(first.validation)) == {row["text"] for row in rows}
    assert not set(texts(first.train)) & set(texts(first.validation))
    assert set(texts(first.validation)) == set(texts(second.validation))
    assert set(texts(load(train=forwards, validation=0.2, seed=1).validation)) != set(texts(first.validation))


def test_fraction_never_parts_equal_rows(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [row for row in ROWS[:10] for _ in range(3)])
    for seed in range(5):
        splits = load(train=source, validation=0.3, seed=seed)
        assert len(texts(splits.validation)) == 9
        assert not set(texts(splits.train)) & set(texts(splits.validation))


def test_fraction_that_leaves_a_side_empty_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ROWS[:4])
    with pytest.raises(DataError, match=r"data\.validation=0\.01 holds out 0 of 4"):
        load(train=source, validation=0.01)


def test_limit_takes_the_same_rows_whatever_their_order_and_not_the_first_of_the_file(tmp_path: Path) -> None:
    forwards, backwards = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", ROWS[::-1])
    limit = {"train": 8, "validation": 5}
    splits = load(train=forwards, validation=backwards, limit=limit)
    expected = sorted(({"text_pair": None, **row} for row in ROWS), key=row_digest)
    assert splits.train.rows == expected[:8]
    assert splits.validation is not None
    assert splits.validation.rows == expected[:5]
    named = {int(origin.rsplit(":", 1)[1]): row for origin, row in zip(splits.train.origins, splits.train, strict=True)}
    assert all(ROWS[line - 1]["text"] == row["text"] for line, row in named.items())


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    same = [load(train=jsonl(tmp_path / f"{name}.jsonl", ROWS)).train.digest for name in "ab"]
    other = load(train=jsonl(tmp_path / "c.jsonl", [*ROWS[:-1], {**ROWS[-1], "label": "c"}])).train.digest
    assert same[0] == same[1]
    assert other != same[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON: Expecting value at column"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n[1]\n', r"a\.jsonl:2: a JSON list where an object was expected"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: JSON nested too deeply"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl is not UTF-8 \(byte 10: invalid start byte\)"),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', r"a\.json: line 2, column 10: not JSON"),
        ("a.json", '{"text": "a", "label": "x"}\n{"text"\n', r"a\.json:2: not JSON"),
        ("a.json", "3", r"holds a JSON int"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "text,label\n", r"a\.csv is empty"),
        ("a.csv", "text,label\na,x\nb, and c,x\n", r"a\.csv:2: 3 fields where the header has 2 \(text, label\)"),
        ("a.csv", 'text,label\n"a,x\n', r"a\.csv: line 2: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: a column name appears twice"),
        ("a.csv", "text,stars\na,b\n,c\n", r"a\.csv:2: 'text' is empty"),
        ("a.csv", "words,mark\na,b\n", r"has no columns .* it has: words, mark\. Set data\.columns\.text"),
        ("a.parquet", "nothing of the kind", r"a\.parquet cannot be read as Parquet: .*magic bytes"),
        ("a.xlsx", "x", r"has the suffix \.xlsx, which says no known format\. Known: \.jsonl"),
    ],
)
def test_faulty_file_is_one_message_that_names_the_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    source = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        load(train=source)


def test_empty_parquet_is_an_empty_data_set(tmp_path: Path) -> None:
    from datasets import Dataset

    with quiet_datasets():
        Dataset.from_dict({"text": [], "label": []}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"a\.parquet is empty"):
        load(train=str(tmp_path / "a.parquet"))


def test_missing_file_is_named_with_the_nearest_beside_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"there is no file .*trian\.jsonl .*did you mean 'train\.jsonl'"):
        load(train=str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"no file matches .*\*\.csv"):
        load(train=str(tmp_path / "*.csv"))


def test_folder_without_data_or_with_a_mixture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file for this split"):
        load(train=str(tmp_path / "empty"))
    jsonl(tmp_path / "mixed" / "a.jsonl", ROWS)
    write(tmp_path / "mixed" / "b.csv", "text,label\na,b\n")
    with pytest.raises(DataError, match=r"several formats: \.csv, \.jsonl"):
        load(train=str(tmp_path / "mixed"))


def test_unreachable_hub_is_one_message_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"data\.train: someone/some-set is no file .*\n?.*hf auth login.* offline, download it"
    ):
        load(train="someone/some-set")


def hub_folder(tmp_path: Path, *splits: str) -> str:
    """A folder laid out like a hub repository, which `datasets` reads the same way."""
    for number, split in enumerate(splits):
        jsonl(tmp_path / "repo" / f"{split}.jsonl", ROWS[number : number + 1])
    return str(tmp_path / "repo")


@pytest.mark.parametrize(
    ("slot", "chosen", "expected"), [("train", None, 0), ("validation", None, 1), ("train", "test", 2)]
)
def test_hub_split_is_that_of_the_slot_or_the_chosen_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slot: Any, chosen: str | None, expected: int
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repo = hub_folder(tmp_path, "train", "dev", "test")
    raw = read_hub(repo, config=None, split=slot, chosen=chosen, source="some/set")
    assert raw.rows == [ROWS[expected]]
    assert raw.origins[0].endswith("#0")


def test_hub_set_without_the_split_names_those_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(DataError, match="some/set has no split 'test'; it has: train"):
        read_hub(hub_folder(tmp_path, "train"), config=None, split="test", chosen=None, source="some/set")
