"""What a run leaves behind loads with plain peft and plain transformers, and is logged where the recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import peftkit
from peftkit.record import read_predictions, read_record

QUICK = ("training.max_steps=2", "training.learning_rate=1e-2", "evaluation.every=never")


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_a_classification_adapter_is_read_by_peft_with_its_head(
    method: str, classify_recipe: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    record = peftkit.train(classify_recipe(*QUICK, method=method), tmp_path)
    torch.manual_seed(99)  # another head than the trained one, until the adapter brings its own
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    rows = read_predictions(tmp_path)
    with torch.no_grad():
        scores = model(**tokenizer("splendid", return_tensors="pt")).logits.softmax(-1)[0].tolist()
    assert scores == pytest.approx(rows[6]["scores"], abs=1e-5)  # the seventh review
    assert record.parameters is not None
    assert record.parameters.artifact_bytes == sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())


def test_a_chat_adapter_is_read_by_peft(chat_recipe: Any, tiny_llama: Path, tmp_path: Path) -> None:
    peftkit.train(chat_recipe(*QUICK), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "adapter")("Hello", return_tensors="pt")
    with torch.no_grad():
        before = plain(**tokens).logits
        after = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(**tokens).logits
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("method", ["full", "head"])
def test_a_trained_model_is_read_by_transformers(method: str, classify_recipe: Any, tmp_path: Path) -> None:
    peftkit.train(classify_recipe(*QUICK, method=method), tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        scores = model(**tokenizer("splendid", return_tensors="pt")).logits.softmax(-1)[0].tolist()
    assert scores == pytest.approx(read_predictions(tmp_path)[6]["scores"], abs=1e-5)


def test_the_record_tells_what_was_measured_and_nothing_else(classify_recipe: Any, tmp_path: Path) -> None:
    recipe = classify_recipe("training.epochs=2", "training.batch_size=4")
    peftkit.train(recipe, tmp_path / "trained")
    record = read_record(tmp_path / "trained")
    assert record.status == "ok"
    assert record.recipe_digest == recipe.digest
    assert record.throughput is not None
    assert record.throughput.samples == 16
    assert 0 <= record.throughput.padding_fraction < 1
    assert record.memory is not None
    assert record.memory.kind == "rss"
    assert record.memory.peak_bytes is not None
    assert [row["step"] for row in record.history] == [2, 4]
    asked = peftkit.train(classify_recipe(method="zero-shot"), tmp_path / "asked")
    assert (asked.throughput, asked.memory) == (None, None)
    assert '"throughput"' not in (tmp_path / "asked" / "record.json").read_text()


def test_two_runs_of_a_recipe_end_in_the_same_numbers(classify_recipe: Any, tmp_path: Path) -> None:
    recipe = classify_recipe("training.epochs=2", "training.batch_size=2")
    one, other = (peftkit.train(recipe, tmp_path / name) for name in ("one", "other"))
    assert one.loss == other.loss
    assert one.metrics == other.metrics


def test_the_log_goes_to_the_tracker_that_the_recipe_names(classify_recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    peftkit.train(classify_recipe(*QUICK, "tracking.to=[tensorboard]"), tmp_path / "run")
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents*"))


def test_the_public_names_are_there() -> None:
    for name in peftkit.__all__:
        assert getattr(peftkit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        getattr(peftkit, "tri" + "an")
