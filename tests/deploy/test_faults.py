"""Each way in which a merged model is known to go wrong is caught, from the files on disk."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.deploy import fold as folding
from peftkit.deploy import merge as merging
from peftkit.deploy.merge import merge
from peftkit.deploy.verification import Question, Verification
from peftkit.deploy.verify import examine
from peftkit.errors import BackboneError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from round_trips import SENTIMENT, adapt
from tiny_models import byte_tokenizer, write_tiny

WEIGHTS = "model.safetensors"
Spoil = Callable[[Path], Any]


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with base, adapter and merged model of each kind; tied embeddings, and one of them trained."""
    folder = tmp_path_factory.mktemp("merged")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # peft, of tied embeddings: that is a case tested
        patch.setattr(merging, "prove", examine)
        for kind, dtype, head, settings in (
            ("float32", "float32", LANGUAGE_HEAD, {}),
            ("bfloat16", "bfloat16", LANGUAGE_HEAD, {}),
            ("classifier", "float32", SENTIMENT, {"task_type": "SEQ_CLS"}),
            ("untied", "float32", LANGUAGE_HEAD, {"modules_to_save": ["embed_tokens"]}),
        ):
            base = write_tiny(folder / kind / "base", "llama", tie_word_embeddings=kind == "untied")
            usual = {"r": 16, "use_rslora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            adapt(folder / kind / "adapter", base, LoraConfig(**{**usual, **settings}), head=head, dtype=dtype)
            merge(folder / kind / "adapter", folder / kind / "out")
    return {kind: folder / kind for kind in ("float32", "bfloat16", "classifier", "untied")}


def check(home: Path, candidate: Path, **asked: Any) -> Verification:
    """The verdict about a candidate against the adapter; digests are not known unless they are given."""
    return examine(Question(reference=str(home / "adapter"), candidate=str(candidate), **asked)).verification


def refold(home: Path, out: Path, spoil: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same merge, with each module spoilt before PEFT folds it."""
    shutil.copytree(home / "out", out)
    real = folding.fold_module

    def fold(wrapper: Any) -> Any:
        spoil(wrapper)
        return real(wrapper)

    monkeypatch.setattr(folding, "row_fold", lambda wrapper: None)
    monkeypatch.setattr(folding, "fold_module", fold)
    folding.fold_by_tensor(merging.read_source(home / "adapter"), out, onto="dequantized", say=lambda text: None)
    return out


def scale(factor: float) -> Callable[[Any], None]:
    def spoil(wrapper: Any) -> None:
        wrapper.scaling["default"] *= factor

    return spoil


def transpose(wrapper: Any) -> None:
    weight = wrapper.get_base_layer().weight
    if weight.shape[0] == weight.shape[1]:
        delta = wrapper.get_delta_weight("default")
        weight.data = weight.data - delta + delta.T


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spoil",
    [scale(0.0), scale(2.0), scale(1 / 4), scale(0.7), transpose],
    ids=["not applied", "applied twice", "rsLoRA ignored", "a little too small", "fan-in and fan-out exchanged"],
)
def test_a_wrong_fold(
    spoil: Callable[[Any], None],
    kind: str,
    merged: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = check(merged[kind], refold(merged[kind], tmp_path / "out", spoil, monkeypatch))
    assert not found.passed
    assert any("effect" in failure or "differs by" in failure for failure in found.failures)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "classifier", "untied"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_right_one_passes(kind: str, streamed: bool, merged: dict[str, Path]) -> None:
    found = check(merged[kind], merged[kind] / "out", streamed=streamed)
    assert found.failures == ()
    assert found.streamed is streamed
    assert found.difference is not None
    assert found.difference.top1_agreement == 1.0 or kind == "bfloat16"
    assert 0 < found.changed_tensors < found.compared_tensors


def test_in_bfloat16_the_noise_of_one_rounding_is_measured_and_bounds_the_divergence(merged: dict[str, Path]) -> None:
    found = check(merged["bfloat16"], merged["bfloat16"] / "out")
    assert found.tolerance is not None
    assert found.difference is not None
    noise = found.tolerance.one_rounding
    assert noise is not None
    assert found.tolerance.mean_kl == pytest.approx(9 * (noise.mean_kl or 0))
    depth_alone = (4 * found.tolerance.rms_logit * 8**0.5 * 2**-8) ** 2 / 2
    assert found.tolerance.mean_kl < depth_alone / 4  # at two layers; 30 layers chain 120 matrices
    assert 0.3 < (found.difference.rms_logit or 0) / (noise.rms_logit or 1) < 2


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return spoil


def edit_config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def change_template(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(": ", " says: ")
    tokenizer.save_pretrained(folder)


def cut_short(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def tie_again(folder: Path) -> None:
    edit_config(tie_word_embeddings=True)(folder)
    edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))(folder)


Q = "model.layers.1.self_attn.q_proj.weight"
SPOILT: dict[str, tuple[str, Spoil, str]] = {
    "head missing": ("classifier", edit_tensors(lambda tensors: tensors.pop("score.weight")), "missing"),
    "head of other labels": ("classifier", edit_config(id2label={"0": "good", "1": "bad"}), "labels"),
    "tied embedding lost": ("untied", edit_tensors(lambda tensors: tensors.pop("lm_head.weight")), "missing"),
    "tied again": ("untied", tie_again, "differs"),
    "template changed": ("float32", change_template, "chat template"),
    "one shard cut short": ("float32", cut_short, "damaged"),
    "a tensor beside it moved": (
        "float32",
        edit_tensors(lambda tensors: tensors["model.norm.weight"].add_(1e-6)),
        "does not touch",
    ),
    "not a number": ("float32", edit_tensors(lambda tensors: tensors[Q][0].fill_(float("nan"))), "not finite"),
    "not a number in bfloat16": (
        "bfloat16",
        edit_tensors(lambda tensors: tensors[Q][0].fill_(float("nan"))),
        "not finite",
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_folder(fault: str, streamed: bool, merged: dict[str, Path], tmp_path: Path) -> None:
    kind, spoil, message = SPOILT[fault]
    shutil.copytree(merged[kind] / "out", tmp_path / "out")
    spoil(tmp_path / "out")
    found = check(merged[kind], tmp_path / "out", streamed=streamed)
    assert not found.passed
    assert any(message in failure for failure in found.failures), found.failures


def test_one_bit_that_flipped_on_the_disk(merged: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(merged["float32"] / "out", tmp_path / "out")
    digests = json.loads((tmp_path / "out" / "merge_report.json").read_text())["files"]
    assert check(merged["float32"], tmp_path / "out", digests=digests).passed
    content = bytearray((tmp_path / "out" / WEIGHTS).read_bytes())
    content[-100] ^= 1
    (tmp_path / "out" / WEIGHTS).write_bytes(content)
    (failure,) = check(merged["float32"], tmp_path / "out", digests=digests).failures
    assert "SHA-256 differs" in failure


def test_a_doubled_bos(tmp_path: Path) -> None:
    from tokenizers import processors

    base = write_tiny(tmp_path / "base", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(base)
    adapt(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    merge(tmp_path / "adapter", tmp_path / "out")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save_pretrained(tmp_path / "out")
    found = check(tmp_path, tmp_path / "out")
    assert "a rendered conversation begins with two BOS tokens" in found.failures


def test_a_model_folded_onto_another_revision_of_the_base(merged: dict[str, Path], tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", "llama", seed=5)
    merge(merged["float32"] / "adapter", tmp_path / "out", base=str(other))  # this adapter doesn't know its weights
    found = check(merged["float32"], tmp_path / "out")
    assert any("does not touch" in failure for failure in found.failures)


def test_another_revision_is_refused_before_anything_is_asked(merged: dict[str, Path], tmp_path: Path) -> None:
    from peftkit.backbones.load import base_identity, load_backbone
    from peftkit.backbones.spec import BackboneSpec

    home = merged["float32"]
    shutil.copytree(home / "adapter", tmp_path / "adapter")
    known = base_identity(load_backbone(BackboneSpec(name=str(home / "base"), dtype="float32"), LANGUAGE_HEAD))
    (tmp_path / "adapter" / "base.json").write_text(json.dumps(known))
    other = write_tiny(tmp_path / "other", "llama", seed=5)
    with pytest.raises(BackboneError, match="other weights"):
        check(tmp_path, home / "out", base=str(other))


def test_without_memory_for_the_model_both_are_read_layer_by_layer(
    merged: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.deploy import verify as verifying

    home = merged["float32"]
    assert not check(home, home / "out").streamed
    memory = verifying.psutil.virtual_memory()
    monkeypatch.setattr(verifying.psutil, "virtual_memory", lambda: memory._replace(available=2**20))
    assert check(home, home / "out").streamed


def test_a_streamed_model_answers_like_the_whole_one_and_is_empty_again(merged: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    from peftkit.backbones.hollow import is_hollow
    from peftkit.deploy.hollow import open_plain
    from peftkit.deploy.streamed import Streamed

    folder = merged["float32"] / "out"
    hollow = open_plain(folder, LANGUAGE_HEAD, torch.float32)
    streamed, ids = Streamed(hollow), torch.tensor([[72, 101, 108]])
    most = 0

    def count(module: torch.nn.Module, args: Any) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in hollow.base.parameters() if not is_hollow(p)))

    for module in hollow.base.modules():
        module.register_forward_pre_hook(count)
    with torch.inference_mode():
        found = streamed.model(input_ids=ids).logits
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert all(is_hollow(parameter) for parameter in hollow.base.parameters())
    layer = sum(parameter.numel() for parameter in hollow.base.model.layers[0].parameters())
    assert most == layer
