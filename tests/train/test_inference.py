"""How fast a run answers, by way of answering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftkit.data.features import IGNORED, Features
from peftkit.run import train
from peftkit.train.inference import NEW_TOKENS, WRITTEN, _prompt


@pytest.mark.parametrize(
    ("method", "ways"),
    [
        ("lora", {"adapter", "base", "merged"}),
        ("prefix", {"adapter", "base"}),  # nothing to fold
        ("qlora", {"adapter", "base"}),  # folding would round quantized weights anew
        ("full", {"merged"}),
    ],
)
def test_a_classifier_is_timed_with_adapter_folded_and_without(
    method: str, ways: set[str], classify_recipe: Any, tmp_path: Path
) -> None:
    recipe = classify_recipe("training.max_steps=1", method=method)
    record = train(recipe, tmp_path / "run", inference=True, planned=False)
    assert set(record.inference) == ways
    for found in record.inference.values():
        assert found.examples == 8
        assert 0 < found.latency_seconds_p50 <= found.latency_seconds_p90
        tokens = found.tokens_per_second / found.samples_per_second  # of the eight examples, padding not counted
        assert 8 * tokens == pytest.approx(round(8 * tokens))


def test_a_model_that_writes_answers_each_prompt_with_as_many_tokens(
    chat_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = train(chat_recipe("training.max_steps=1"), tmp_path / "run", inference=True, planned=False)
    assert set(record.inference) == {"adapter", "base", "merged"}
    for found in record.inference.values():
        assert found.examples == WRITTEN
        assert found.tokens_per_second == pytest.approx(NEW_TOKENS * found.samples_per_second)


def test_measuring_changes_nothing_that_the_run_reports(chat_recipe: Any, tmp_path: Path) -> None:
    plain, timed = (
        train(chat_recipe("training.max_steps=2"), tmp_path / name, inference=name == "timed", planned=False)
        for name in ("plain", "timed")
    )
    assert not plain.inference
    assert (timed.metrics, timed.loss) == (plain.metrics, plain.loss)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() == (tmp_path / "timed" / weights).read_bytes()


def test_the_prompt_ends_where_the_answer_begins() -> None:
    ids = np.arange(6, dtype=np.int32)
    target = np.array([IGNORED, IGNORED, IGNORED, 3, 4, 5], dtype=np.int32)
    assert _prompt(Features(ids, target, 3, 0)).tolist() == [0, 1, 2]
    assert _prompt(Features(ids, ids, 5, 0)).tolist() == [0, 1, 2], "of a text that is all answer, the first half"
