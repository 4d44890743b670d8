"""The packaged data sets: what is in them, and that nothing crosses their splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pytest

from peftkit.data.builtin import (
    SPLITS,
    Unit,
    as_messages,
    builtin_names,
    chat_units,
    load_builtin,
    normalised,
    sentiment_units,
    split_units,
)
from peftkit.errors import DataError

SENTIMENT = [name for name in builtin_names() if name.endswith("-sentiment")]


def key_of(row: dict[str, Any]) -> str:
    return normalised(row["text"] if "text" in row else row["messages"][0]["content"])


@pytest.mark.parametrize("name", builtin_names())
def test_no_text_and_no_prompt_crosses_the_splits(name: str) -> None:
    train, validation, test = ({key_of(row) for row in load_builtin(name, split)} for split in SPLITS)
    assert train
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("name", SENTIMENT)
def test_every_sentiment_split_has_its_tenth_of_each_label_and_no_text_twice(name: str) -> None:
    counts = {split: Counter(load_builtin(name, split)["label"]) for split in SPLITS}
    for label in ("negative", "positive"):
        total = sum(counts[split][label] for split in SPLITS)
        tenth = round(total / 10)
        assert [counts[split][label] for split in SPLITS] == [total - 2 * tenth, tenth, tenth]
    texts = [key_of(row) for split in SPLITS for row in load_builtin(name, split)]
    assert len(texts) == len(set(texts))


def test_movie_sentiment_is_the_whole_corpus_less_the_neutral_and_the_doubled() -> None:
    # 10,605 sentences; 533 score nearer to zero than 0.5; 2 say again what another says
    assert sum(len(load_builtin("movie-sentiment", split)) for split in SPLITS) == 10_605 - 533 - 2


def test_rows_lie_in_hash_order_so_that_files_are_not_sorted_by_label() -> None:
    hashes = [hashlib.sha256(key_of(row).encode()).hexdigest() for row in load_builtin("movie-sentiment", "test")]
    assert hashes == sorted(hashes)


def test_chatterbot_turns_alternate_end_with_an_answer_and_come_once() -> None:
    conversations = [row["messages"] for split in SPLITS for row in load_builtin("chatterbot-en", split)]
    for messages in conversations:
        assert len(messages) % 2 == 0
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)
    told = Counter(tuple(normalised(message["content"]) for message in messages) for messages in conversations)
    assert set(told.values()) == {1}
    assert max(len(messages) for messages in conversations) == 26


def test_chatterbot_splits_hold_about_a_tenth_each() -> None:
    sizes = {split: len(load_builtin("chatterbot-en", split)) for split in SPLITS}
    total = sum(sizes.values())
    # every one of the 21 files rounds its tenth, and the last prompt that fits in may bring several conversations
    for split in ("validation", "test"):
        assert 0.08 * total < sizes[split] < 0.15 * total


def test_texts_scored_both_ways_are_left_out_and_repeats_kept_once() -> None:
    units = sentiment_units(
        [(2.0, "Good  Film "), (1.0, "good film"), (3.0, "odd"), (-3.0, "Odd"), (0.4, "meh"), (-0.5, "Bad")]
    )
    assert units == [
        Unit("good film", "positive", ({"text": "Good  Film", "label": "positive"},)),
        Unit("bad", "negative", ({"text": "Bad", "label": "negative"},)),
    ]


def test_conversations_with_one_first_message_make_one_unit() -> None:
    units = chat_units([("a", ["Hi", "Hello"]), ("b", ["hi ", "Hey"]), ("b", ["HI", "hello"]), ("b", "no list")])
    assert [(unit.text, unit.stratum, len(unit.rows)) for unit in units] == [("hi", "a", 2)]


def test_unusable_turns_make_no_conversation_and_scalars_become_text() -> None:
    assert as_messages(["Year?", 1969, "Really?"]) == [
        {"role": "user", "content": "Year?"},
        {"role": "assistant", "content": "1969"},
    ]
    assert as_messages(["Hi", " ", "x", "y"]) == []
    assert as_messages(["Hi", None]) == []
    assert as_messages(["alone"]) == []


def test_a_split_depends_on_the_texts_and_not_on_their_order() -> None:
    units = [Unit(f"text {number}", "even" if number % 2 == 0 else "odd", ({"text": number},)) for number in range(34)]
    forwards, backwards = split_units(units), split_units(reversed(units))
    assert forwards == backwards
    assert [len(forwards[split]) for split in SPLITS] == [26, 4, 4]  # of 17 and 17, whose tenth is 1.7
    assert Counter(row["text"] % 2 for row in forwards["test"]) == {0: 2, 1: 2}


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'movie-sentiment'"):
        load_builtin("movie-sentimant", "train")
