"""Folding tensor by tensor gives what PEFT's own merge gives, whatever the method, the family and the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peftkit.backbones.hollow import build_hollow, is_hollow
from peftkit.backbones.load import read_config
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec, Head
from peftkit.deploy.adapter import read_source
from peftkit.deploy.fold import Folded, fewer_threads, fold_by_tensor
from peftkit.deploy.fold_memory import fold_in_memory
from peftkit.deploy.weights import NotByTensor
from peftkit.errors import BackboneError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from round_trips import METHODS, SENTIMENT, adapt, configure
from tiny_models import ALPHABET_SIZE, ENCODERS, FAMILIES, write_tiny

IDS = torch.tensor([[72, 101, 108, 108, 111, 44, 32, 1], [119, 111, 114, 108, 100, 33, 9, 1]])


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model of each family."""
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_tiny(folder / family, family) for family in FAMILIES}


def fold(adapter: Path, out: Path) -> Folded:
    out.mkdir()
    return fold_by_tensor(read_source(adapter), out, onto="dequantized", say=lambda text: None)


@torch.inference_mode()
def answers(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def reload(folder: Path, head: Head = LANGUAGE_HEAD) -> Any:
    auto = AutoModelForCausalLM if head.kind == "language" else AutoModelForSequenceClassification
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize("family", ["bert", "t5", "llama", "qwen2", "gemma", "phi"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_family_answers_like_the_live_adapter(
    method: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    head = SENTIMENT if family in ENCODERS else LANGUAGE_HEAD
    live = adapt(tmp_path / "adapter", bases[family], configure(method, family), head=head)
    fold(tmp_path / "adapter", tmp_path / "out")
    expected, found = answers(live), answers(reload(tmp_path / "out", head))
    with live.disable_adapter():
        assert (answers(live) - expected).abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_weights_are_those_of_a_merge_in_memory_bit_for_bit(
    method: str, dtype: str, quantization: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapt(tmp_path / "adapter", bases["llama"], configure(method, "llama"), dtype=dtype, quantization=quantization)
    by_tensor = fold(tmp_path / "adapter", tmp_path / "one")
    (tmp_path / "other").mkdir()
    whole = fold_in_memory(read_source(tmp_path / "adapter"), tmp_path / "other", onto="dequantized")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (by_tensor.modules, by_tensor.dithered) == (whole.modules, whole.dithered)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "other"))
    assert ours == theirs


def test_shards_keep_their_layout_and_untouched_tensors_their_bytes(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "llama", shard_size="100KB")
    files = sorted(base.glob("*.safetensors"))
    assert len(files) > 2
    live = adapt(tmp_path / "adapter", base, configure("lora", "llama"))
    folded = fold(tmp_path / "adapter", tmp_path / "out")
    index, before = (json.loads((at / "model.safetensors.index.json").read_text()) for at in (tmp_path / "out", base))
    assert index["weight_map"] == before["weight_map"]
    assert folded.digests.keys() == {file.name for file in files}
    for file in files:
        mine, theirs = load_file(tmp_path / "out" / file.name), load_file(file)
        assert list(mine) == list(theirs)
        changed = {name for name in mine if not torch.equal(mine[name], theirs[name])}
        assert changed == {name for name in mine if "_proj" in name}
    assert (answers(reload(tmp_path / "out")) - answers(live)).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head", "q_proj"]}, False),
        ({"trainable_token_indices": [72, 101]}, True),
        ({"target_modules": ["q_proj"]}, True),
    ],
    ids=lambda value: "-".join(f"{key}" for key in value) if isinstance(value, dict) else str(value),
)
def test_tied_embeddings_are_told_apart_when_only_one_was_trained(
    settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    base = write_tiny(tmp_path / "base", "llama", tie_word_embeddings=True)
    usual = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    live = adapt(tmp_path / "adapter", base, peft.LoraConfig(**{**usual, **settings}))
    fold(tmp_path / "adapter", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in stored) is not tied
    assert (answers(reload(tmp_path / "out")) - answers(live)).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_grew_comes_along(tied: bool, tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "llama", tie_word_embeddings=tied)
    torch.manual_seed(1)
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(ALPHABET_SIZE + 6, mean_resizing=True)
    model = peft.get_peft_model(grown, configure("lora", "llama"))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "base.json").write_text(json.dumps({"name": str(base), "dtype": "float32"}))
    fold(tmp_path / "adapter", tmp_path / "out")
    merged = reload(tmp_path / "out")
    assert merged.config.vocab_size == ALPHABET_SIZE + 6
    assert (answers(merged) - answers(model.eval())).abs().max() < 1e-4


def test_weights_that_lie_in_by_out_fold_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    live = adapt(tmp_path / "adapter", bases["gpt2"], config)
    fold(tmp_path / "adapter", tmp_path / "out")
    assert (answers(reload(tmp_path / "out")) - answers(live)).abs().max() < 1e-4


def test_an_architecture_whose_files_are_converted_goes_through_memory(bases: dict[str, Path], tmp_path: Path) -> None:
    live = adapt(tmp_path / "adapter", bases["mixtral"], peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(NotByTensor, match="converts the weights of mixtral"):
        fold(tmp_path / "adapter", tmp_path / "out")
    fold_in_memory(read_source(tmp_path / "adapter"), tmp_path / "out", onto="dequantized")
    assert (answers(reload(tmp_path / "out")) - answers(live)).abs().max() < 1e-4


def test_a_shard_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "llama", shard_size="100KB")
    adapt(tmp_path / "adapter", base, configure("lora", "llama"))
    file = sorted(base.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(BackboneError, match=f"{file.name} is damaged"):
        fold(tmp_path / "adapter", tmp_path / "one")
    file.unlink()
    with pytest.raises(BackboneError, match=f"lacks {file.name}"):
        fold(tmp_path / "adapter", tmp_path / "two")


def test_a_base_of_another_shape_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "llama")
    adapt(tmp_path / "adapter", base, configure("lora", "llama"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(65)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"model.norm.weight is \[65\]"):
        fold(tmp_path / "adapter", tmp_path / "out")


def test_a_hollow_model_has_every_shape_and_no_storage(bases: dict[str, Path]) -> None:
    model = build_hollow(read_config(BackboneSpec(name=str(bases["llama"]))), LANGUAGE_HEAD)
    whole = AutoModelForCausalLM.from_pretrained(bases["llama"])
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert all(is_hollow(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(("threads", "within"), [(3, 2), (1, 1)])
def test_a_core_is_left_to_the_writer_while_a_fold_lasts(threads: int, within: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with fewer_threads(1):
            assert torch.get_num_threads() == within
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
