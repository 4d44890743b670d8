"""The preview shows the tokens of an example and marks, without colour, which of them carry loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peftkit.backbones import local_path
from peftkit.data.chat import encode_conversation
from peftkit.data.features import Features
from peftkit.data.preview import preview, render_preview

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello é😀\n\x1b[31m!"}]


@pytest.fixture(scope="module")
def smollm() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(local_path("smollm2-135m"))


def talk_features(tokenizer: Any) -> Features:
    encoded = encode_conversation(TALK, tokenizer, train_on="assistant", system="S", max_tokens=100)
    return Features(encoded.input_ids, encoded.target, loss_units=0, row=1)


def test_texts_of_the_tokens_add_up_and_loss_is_that_of_the_target(smollm: Any) -> None:
    example = talk_features(smollm)
    (shown,) = preview([example], smollm, origins=["a:1", "a:2"], count=5)
    assert shown["origin"] == "a:2"
    assert "".join(token["text"] for token in shown["tokens"]) == smollm.apply_chat_template(
        [{"role": "system", "content": "S"}, *TALK], tokenize=False
    )
    assert [token["id"] for token in shown["tokens"]] == example.input_ids.tolist()
    learned = "".join(token["text"] for token in shown["tokens"] if token["loss"])
    assert learned == TALK[1]["content"] + "<|im_end|>"
    assert shown["num_tokens"] == len(example)
    assert shown["loss_tokens"] == sum(token["loss"] for token in shown["tokens"])


def test_first_token_carries_no_loss_since_nothing_predicts_it(smollm: Any) -> None:
    ids = np.asarray(smollm("one two three").input_ids, dtype=np.int32)
    (shown,) = preview([Features(ids, ids, loss_units=2, row=0)], smollm, origins=["t:1"], count=1)
    assert [token["loss"] for token in shown["tokens"]] == [False, True, True]
    assert shown["loss_tokens"] == 2


def test_loss_is_marked_without_colour_and_data_cannot_steer_the_terminal(smollm: Any) -> None:
    text = render_preview(preview([talk_features(smollm)], smollm, origins=["", "a:2"], count=1))
    assert "\x1b" not in text.plain
    assert text.plain.count("⟦") == text.plain.count("⟧") == 1
    learned = text.plain.split("⟦")[1].split("⟧")[0]
    assert learned.replace("·", "") == "Hello é😀↵\n\\x1b[31m!<|im_end|>"
    assert learned.endswith("!·<|im_end|>")
    assert text.plain.splitlines()[0].startswith("a:2")


def test_only_so_many_are_shown(smollm: Any) -> None:
    examples = [talk_features(smollm)] * 3
    assert len(preview(examples, smollm, origins=["x", "y"], count=2)) == 2


@pytest.mark.parametrize(
    ("target", "labels", "expected"),
    [
        (1, ("bad", "good"), "good"),
        (1, None, 1),
        (0.25, None, 0.25),
        (np.asarray([1, 0, 1], dtype=np.float32), ("a", "b", "c"), ["a", "c"]),
    ],
)
def test_sequence_target_is_shown_as_its_label(smollm: Any, target: Any, labels: Any, expected: Any) -> None:
    ids = np.asarray(smollm("fine film").input_ids, dtype=np.int32)
    shown = preview([Features(ids, target, loss_units=1, row=0)], smollm, origins=["t:1"], count=1, labels=labels)
    assert shown[0]["target"] == expected
    assert shown[0]["loss_tokens"] == 0
    assert f"-> ⟦{expected}⟧" in render_preview(shown).plain
