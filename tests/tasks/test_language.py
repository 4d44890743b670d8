"""Token tasks: the head sees labelled positions alone, and the loss is what it would have been over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from peftkit.data.batching import Batch, collate
from peftkit.data.features import IGNORED, Features
from peftkit.prepare import Prepared, prepare
from peftkit.tasks.language import labelled_logits
from peftkit.train.progress import PlainObserver


def ready_with(recipe: Any) -> tuple[Prepared, Batch]:
    ready = prepare(recipe, PlainObserver(), device=torch.device("cpu"))
    backbone = ready.backbone
    features = ready.task.encode(
        ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128
    ).features
    return ready, collate(features, backbone.tokenizer.pad_token_id)


@pytest.mark.parametrize("method", ["zero-shot", "lora", "prefix", "prompt"])
def test_labelled_logits_are_those_of_the_whole_model(method: str, chat_recipe: Any) -> None:
    ready, batch = ready_with(chat_recipe(method=method))
    model = ready.adapted.model.eval()
    with torch.no_grad():
        found, target = labelled_logits(model, batch)
        whole = model(**batch.inputs()).logits[:, -batch.target.shape[1] :]  # virtual tokens are in front
    mask = batch.target[:, 1:] != IGNORED
    torch.testing.assert_close(found, whole[:, :-1][mask])
    assert torch.equal(target, batch.target[:, 1:][mask])


@pytest.mark.parametrize("method", ["zero-shot", "lora", "prefix", "prompt"])
def test_padding_changes_no_prediction(method: str, chat_recipe: Any) -> None:
    ready, batch = ready_with(chat_recipe(method=method))
    model = ready.adapted.model.eval()
    together = ready.task.predict(model, batch)
    backbone, recipe = ready.backbone, chat_recipe(method=method)
    features = ready.task.encode(
        ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128
    ).features
    alone = [ready.task.predict(model, collate([feature], backbone.tokenizer.pad_token_id))[0] for feature in features]
    for one, other in zip(together, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_label_smoothing_is_torchs_own(chat_recipe: Any) -> None:
    ready, batch = ready_with(chat_recipe())
    model = ready.adapted.model.eval()
    logits, target = labelled_logits(model, batch)
    expected = functional.cross_entropy(logits, target, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(ready.task.loss(model, batch, smoothing=0.1), expected)


def test_metrics_follow_from_the_counts(chat_recipe: Any) -> None:
    ready, _ = ready_with(chat_recipe())
    predictions = [
        {"row": 0, "loss": 2.0, "tokens": 4, "correct": 4},
        {"row": 1, "loss": 4.0, "tokens": 2, "correct": 1},
    ]
    found = ready.task.metrics(predictions, intervals=False)
    assert found["token_accuracy"].value == pytest.approx(5 / 6)
    assert found["perplexity"].value == pytest.approx(float(np.exp(6.0 / 6)))
    assert found["exact_match"].value == pytest.approx(0.5)


def test_few_shot_scores_the_same_tokens_as_zero_shot(chat_recipe: Any) -> None:
    recipe = chat_recipe()
    ready, _ = ready_with(recipe)
    table = ready.splits.train
    plain = ready.task.encode(
        table, ready.backbone.tokenizer, ready.backbone.dims, recipe.data, max_tokens=128
    ).features
    shown = ready.task.prompt(ready.backbone, table, table, shots=2, data=recipe.data, max_tokens=128)
    assert not isinstance(shown, list)
    for one, other in zip(plain, shown.features, strict=True):
        assert one.loss_units == other.loss_units
        kept = [np.asarray(f.target)[np.asarray(f.target) != IGNORED].tolist() for f in (one, other)]
        assert kept[0] == kept[1]
        assert len(other) > len(one)


def test_a_stop_token_that_never_carries_loss_is_told(chat_recipe: Any) -> None:
    ready, _ = ready_with(chat_recipe())
    tokenizer = ready.backbone.tokenizer
    endless = Features(np.array([900, 901, 902], np.int32), np.array([IGNORED, 901, 902], np.int32), 2, 0)
    assert "never carries loss" in ready.task.inspect([endless], tokenizer)[0]
    recipe = chat_recipe()
    table = ready.splits.train
    whole = ready.task.encode(table, tokenizer, ready.backbone.dims, recipe.data, max_tokens=128).features
    assert ready.task.inspect(whole, tokenizer) == []


def test_an_example_cut_before_its_answer_is_left_out_and_told(
    chat_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peftkit.run import train

    # The default system message and the question take about 30 tokens, so 40 leave a part of some answers.
    train(chat_recipe("training.max_tokens=40", "training.max_steps=2", "evaluation.every=never"), tmp_path / "run")
    assert "lost part of their answer to training.max_tokens (40)" in capsys.readouterr().err
