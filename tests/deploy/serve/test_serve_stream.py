"""Tokens become text as they come, and the text ends where a client wants it to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkit.deploy.serve.text import TextStream

SAID = "Grüße, 日本語 and 🎉 — then more."


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def pieces(tokenizer: Any, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
    found = []
    for token in tokenizer(SAID)["input_ids"]:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return found, stream


def test_the_pieces_are_the_text_and_no_character_is_broken(tokenizer: Any) -> None:
    found, stream = pieces(tokenizer)
    assert "".join(found) + stream.rest() == SAID
    assert "\ufffd" not in "".join(found)
    assert "" in found, "the bytes of 🎉 are several tokens, and all but the last say nothing yet"


@pytest.mark.parametrize("stop", ["日本", "本語 and", "🎉", "then more.", "G", "more"])
def test_a_stop_string_ends_it_wherever_its_tokens_begin(tokenizer: Any, stop: str) -> None:
    found, stream = pieces(tokenizer, ("not in it", stop))
    assert "".join(found) == SAID[: SAID.index(stop)]
    assert stream.stopped


def test_what_only_began_like_a_stop_string_is_said_in_the_end(tokenizer: Any) -> None:
    found, stream = pieces(tokenizer, ("more. And more",))
    assert "".join(found) == SAID.removesuffix("more.")
    assert stream.rest() == "more."
