"""Classification: labels, targets, decisions, and pooling that padding and virtual tokens cannot move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.backbones.spec import Head
from peftkit.data.batching import collate
from peftkit.data.table import Table
from peftkit.errors import DataError
from peftkit.prepare import Prepared, prepare
from peftkit.recipe import build_recipe
from peftkit.run import train
from peftkit.tasks import read_head
from peftkit.tasks.classify import ClassifyTask
from peftkit.tasks.spec import Classify
from peftkit.train.progress import PlainObserver


def table_of(labels: list[Any]) -> Table:
    rows = [{"text": f"text {i}", "text_pair": None, "label": label} for i, label in enumerate(labels)]
    return Table(rows, [f"rows.csv:{i}" for i in range(len(rows))], "")


def ready_with(recipe: Any) -> tuple[Prepared, list[Any]]:
    ready = prepare(recipe, PlainObserver(), device=torch.device("cpu"))
    backbone = ready.backbone
    encoded = ready.task.encode(ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128)
    return ready, encoded.features


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "head"])
@pytest.mark.parametrize("backbone", ["encoder", "causal"])
def test_padding_changes_no_decision(
    backbone: str, method: str, classify_recipe: Any, tiny_llama: Path, reviews_file: Path
) -> None:
    recipe = classify_recipe(method=method)
    if backbone == "causal":
        recipe = classify_recipe(f"backbone.name={tiny_llama}", method=method)
    ready, features = ready_with(recipe)
    model, pad = ready.adapted.model.eval(), ready.backbone.tokenizer.pad_token_id
    together = ready.task.predict(model, collate(features, pad))
    for feature, shared in zip(features, together, strict=True):
        alone = ready.task.predict(model, collate([feature], pad))[0]
        assert alone["scores"] == pytest.approx(shared["scores"], abs=1e-5)


def test_a_causal_backbone_is_pooled_as_transformers_pools_one_text(classify_recipe: Any, tiny_llama: Path) -> None:
    ready, features = ready_with(classify_recipe(f"backbone.name={tiny_llama}", method="prompt"))
    model = ready.adapted.model.eval()
    batch = collate(features[:1], ready.backbone.tokenizer.pad_token_id)
    with torch.no_grad():
        expected = model(**batch.inputs()).logits.softmax(-1)[0].tolist()
    assert ready.task.predict(model, batch)[0]["scores"] == pytest.approx(expected, abs=1e-5)


def test_labels_are_those_of_the_training_split_in_order() -> None:
    assert read_head(Classify(), table_of(["b", "a", "b"])) == Head(
        "classification", ("a", "b"), "single_label_classification"
    )
    assert read_head(Classify(), table_of([["x"], ["y", "x"]])).problem == "multi_label_classification"
    assert read_head(Classify(), table_of([0.5, 1.5])).num_outputs == 1


def test_one_label_alone_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        read_head(Classify(), table_of(["a", "a"]))


def test_a_label_unseen_in_train_is_refused_with_its_row(classify_recipe: Any) -> None:
    ready, _ = ready_with(classify_recipe())
    with pytest.raises(DataError, match=r"rows\.csv:1: label 'goood' does not occur.*did you mean 'good'"):
        ready.task.encode(
            table_of(["good", "goood"]),
            ready.backbone.tokenizer,
            ready.backbone.dims,
            classify_recipe().data,
            max_tokens=64,
        )


def test_scores_become_decisions_by_argmax_threshold_or_as_they_are() -> None:
    single = ClassifyTask(Classify(), Head("classification", ("a", "b"), "single_label_classification"))
    assert single.prediction(0, [0.4, 0.6], 1)["prediction"] == 1
    several = ClassifyTask(Classify(threshold=0.3), Head("classification", ("a", "b"), "multi_label_classification"))
    assert several.prediction(0, [0.31, 0.2], [1.0, 0.0])["prediction"] == [1, 0]
    number = ClassifyTask(Classify(), Head("classification", (), "regression"))
    assert number.prediction(0, [2.5], 2.0)["prediction"] == 2.5


def test_chance_is_what_the_most_frequent_label_scores() -> None:
    task = ClassifyTask(Classify(), Head("classification", ("a", "b"), "single_label_classification"))
    predictions = [task.prediction(i, [0.4, 0.6], label) | {"loss": 0.5} for i, label in enumerate([1, 1, 1, 0])]
    accuracy = task.metrics(predictions, intervals=True)["accuracy"]
    assert (accuracy.value, accuracy.chance, accuracy.n) == (0.75, 0.75, 4)
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert accuracy.low <= 0.75 <= accuracy.high


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([["x"], ["y"], ["x", "y"], ["x"]], "macro_f1"),
        ([0.5, 1.5, 2.5, 0.25], "pearson"),
    ],
)
def test_multi_label_and_regression_train_end_to_end(
    labels: list[Any], expected: str, tiny_bert: Path, tmp_path: Path
) -> None:
    import json

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"word{i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    content = {"backbone": str(tiny_bert), "method": "lora", "task": "classify", "data": {"train": str(path)}}
    content["data"] |= {"validation": str(path), "test": str(path)}  # type: ignore[operator]
    record = train(build_recipe(content, ["training.max_steps=2"]), tmp_path / "run")
    assert expected in record.metrics


def test_zero_shot_and_few_shot_answer_on_both_families(classify_recipe: Any, tiny_llama: Path, tmp_path: Path) -> None:
    for number, overrides in enumerate([(), (f"backbone.name={tiny_llama}",)]):
        for method in ("zero-shot", {"kind": "few-shot", "examples": 2}):
            folder = tmp_path / f"{number}-{method if isinstance(method, str) else 'few'}"
            record = train(classify_recipe(*overrides, method=method), folder)
            assert record.metrics["accuracy"].n == 8
            assert record.throughput is None
            assert not record.artifacts
