"""ONNX graphs: encoder, classifier and causal model against torch, from the files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peftkit.backbones.load import load_backbone
from peftkit.backbones.spec import BackboneSpec, Head
from peftkit.cli import main
from peftkit.deploy import onnx_graph
from peftkit.deploy.export import ExportReport, export
from peftkit.deploy.onnx_graph import check_graph
from peftkit.deploy.parity import PROMPTS
from peftkit.errors import BackboneError, InputError
from peftkit.files import write_json

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
LABELS = ("bad", "good", "mixed")


@pytest.fixture(scope="module")
def classifier(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder with a head of three labels, as a merge leaves it."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    head = Head("classification", LABELS, "single_label_classification")
    backbone = load_backbone(BackboneSpec(name=str(tiny_bert), dtype="float32"), head)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    write_json(folder / "head.json", asdict(head))
    return folder


@pytest.fixture(scope="module")
def exported(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    """Its graph, and the report."""
    out = tmp_path_factory.mktemp("exports") / "classifier"
    return out, export(classifier, "onnx", out)


def test_a_classifier_gives_torchs_logits_at_any_batch_and_length(
    classifier: Path, exported: tuple[Path, ExportReport]
) -> None:
    out, report = exported
    assert report.parity.status == "ok"
    assert report.parity.positions == 2 * len(PROMPTS)  # each alone, and all in one padded batch
    assert report.parity.top1_agreement == 1.0
    assert report.parity.max_abs_difference is not None
    assert report.parity.max_abs_difference < 1e-5  # float32 on both sides
    inputs = dict(
        AutoTokenizer.from_pretrained(out)(["splendid", "not my film"] * 3, padding=True, return_tensors="np")
    )
    found = onnxruntime.InferenceSession(str(out / "model.onnx")).run(["logits"], inputs)[0]
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert json.loads((out / "head.json").read_text())["labels"] == list(LABELS)
    assert json.loads((out / "config.json").read_text())["id2label"]["2"] == "mixed"


def test_another_model_behind_the_graph_is_caught(classifier: Path, exported: tuple[Path, ExportReport]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    with torch.no_grad():
        model.classifier.bias += torch.tensor([0.0, 0.1, 0.0])
    found = check_graph(model, AutoTokenizer.from_pretrained(classifier), exported[0], causal=False)
    assert found.status == "failed"
    assert "an output differs by" in found.failures[0]


def test_a_causal_model_answers_over_its_cache_as_in_torch(small_llama: Path, tmp_path: Path) -> None:
    report = export(small_llama, "onnx", tmp_path / "out")
    assert "decode.onnx" in report.files
    assert report.parity.identical_answers == report.parity.prompts == len(PROMPTS)
    names = {each.name for each in onnxruntime.InferenceSession(str(tmp_path / "out" / "decode.onnx")).get_inputs()}
    assert any("past_key_values" in name for name in names)


def test_what_cannot_be_a_graph_is_refused(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((tiny_bert / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    folder = tmp_path / "masked"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_bert / name).read_bytes())
    with pytest.raises(BackboneError, match="BertForMaskedLM; encoders, sequence classifiers"):
        export(folder, "onnx", tmp_path / "out")
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match="--to onnx needs onnxscript"):
        export(tiny_bert, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_packaged_encoder_gives_torchs_hidden_states(tmp_path: Path, capsys: Any) -> None:
    assert main(["export", "minilm-l6", "--to", "onnx", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["parity"]
    assert found["status"] == "ok"
    assert found["prompts"] == len(PROMPTS) >= 20
    assert found["max_abs_difference"] < 1e-4
