"""A merge is proven from the files on disk; every planted fault is caught; nothing unproven stands at the output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peftkit.backbones.load import Backbone, base_identity, load_backbone
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec, Head
from peftkit.deploy import fold as folding
from peftkit.deploy import merge as merging
from peftkit.deploy.merge import MergeReport, merge
from peftkit.deploy.probes import TEXTS
from peftkit.deploy.verify import examine
from peftkit.errors import BackboneError, InputError, MethodError, OutputError, PeftkitError, VerificationFailed
from peftkit.files import write_json
from peftkit.methods import Method
from peftkit.methods.lora import Lora
from peftkit.methods.peft_any import PeftAny
from peftkit.methods.prefix import Prefix
from peftkit.methods.prompt import Prompt
from peftkit.recipe import build_recipe
from peftkit.run import train

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from tiny_models import write_tiny

SENTIMENT = Head("classification", ("bad", "good"), "single_label_classification")
LABELS = Head("classification", ("a", "b", "c"), "multi_label_classification")
NUMBER = Head("classification", (), "regression")
FOLDABLE = {
    "lora": Lora(rank=4),
    "rslora": Lora(rank=16, rslora=True),
    "dora": Lora(rank=4, dora=True),
    "pissa": Lora(rank=4, init="pissa"),
    "olora": Lora(rank=4, init="olora"),
    "some layers": Lora(rank=4, layers="top-1", targets=["q_proj", "down_proj"]),
    "modules to save": Lora(rank=4, modules_to_save=["norm"]),
    "ia3": PeftAny(type="IA3"),
    "loha": PeftAny.model_validate({"kind": "peft", "type": "LOHA", "r": 2, "target_modules": ["q_proj", "up_proj"]}),
    "lokr": PeftAny.model_validate({"kind": "peft", "type": "LOKR", "r": 2, "target_modules": ["q_proj", "up_proj"]}),
    "oft": PeftAny.model_validate({"kind": "peft", "type": "OFT", "oft_block_size": 8, "target_modules": ["q_proj"]}),
    "vera": PeftAny.model_validate({"kind": "peft", "type": "VERA", "r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "layer norm": PeftAny(type="LN_TUNING"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("base") / "tiny-llama", seed=0)


def write_llama(folder: Path, *, seed: int, hidden: int = 64, layers: int = 2, tied: bool = False) -> Path:
    """A random Llama with a byte tokenizer and a chat template, as an ordinary model folder."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return write_tiny(folder, "llama", seed=seed, tie_word_embeddings=tied, **sizes)


def make_adapter(
    folder: Path,
    base: str | Path,
    method: Method,
    *,
    head: Head = LANGUAGE_HEAD,
    identity: bool = True,
    amount: float = 0.02,
    **numbers: Any,
) -> Backbone:
    """An adapter whose trainable numbers have all moved, as a run saves it; returns its live model as a backbone."""
    spec = BackboneSpec(name=str(base), **{"dtype": "float32", **numbers})
    torch.manual_seed(1)
    backbone = load_backbone(spec, head)
    adapted = method.attach(backbone)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter += amount * torch.randn_like(parameter)
    adapted.save(folder)
    write_json(folder / "head.json", asdict(head))
    if identity:
        dtype = str(backbone.compute_dtype).removeprefix("torch.")
        write_json(folder / "base.json", base_identity(backbone) | {"dtype": dtype})
    adapted.model.eval()
    return Backbone(adapted.model, backbone.tokenizer, backbone.dims, spec, backbone.folder, backbone.compute_dtype)


def read_report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())
    return content


@torch.inference_mode()
def logits(model: Any, tokenizer: Any, text: str = TEXTS[0]) -> torch.Tensor:
    found: torch.Tensor = model(**tokenizer(text, return_tensors="pt")).logits
    return found


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of any norm it has not listed
@pytest.mark.parametrize("name", FOLDABLE)
def test_a_merged_model_answers_like_the_live_adapter(name: str, llama: Path, tmp_path: Path) -> None:
    live = make_adapter(tmp_path / "adapter", llama, FOLDABLE[name])
    report = merge(tmp_path / "adapter", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected, bare = (
        logits(live.model, live.tokenizer),
        logits(load_backbone(live.spec, LANGUAGE_HEAD).model, tokenizer),
    )
    found = logits(plain, tokenizer)
    assert (found - expected).abs().max() < 1e-4 < 1e-2 < (bare - expected).abs().max()
    assert report.verification.difference is not None
    assert report.verification.difference.top1_agreement == 1.0
    assert report.verification.continuations is not None
    assert report.verification.continuations.identical == report.verification.continuations.prompts == 4
    assert report.verification.changed_tensors > 0
    assert report.folded == "by tensor"
    assert report.base.recognised_by == "weights"
    assert report.status == "ok"


def test_the_output_is_an_ordinary_model_folder_with_template_card_and_report(llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4), quantization="nf4")
    merge(tmp_path / "adapter", tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert config["use_cache"] is True
    assert (out / "generation_config.json").is_file()
    rendered = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert rendered == "user: hi<eos>"
    assert 'base_model: "tiny-llama"' in (out / "README.md").read_text()
    assert read_report(out)["verification"]["passed"] is True
    assert not list(tmp_path.glob(".partial-*"))


def test_bfloat16_weights_are_rounded_once_and_agree_within_the_rounding(llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4), dtype="bfloat16")
    report = merge(tmp_path / "adapter", tmp_path / "out")
    assert report.dtype == "bfloat16"
    assert report.verification.tolerance.unit_roundoff == 2**-8
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16), tmp_path / "adapter"
    )
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    assert torch.equal(stored["model.layers.0.self_attn.q_proj.weight"], exact.bfloat16())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_folded_onto_the_weights_it_stands_for(
    quantization: str, llama: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4), quantization=quantization)
    report = merge(tmp_path / "adapter", tmp_path / "out")
    right, wrong = report.weights["dequantized"], report.weights["original"]
    assert right.max_abs_logit is not None
    assert wrong.max_abs_logit is not None
    assert right.max_abs_logit < 1e-4 < 1e-2 < wrong.max_abs_logit
    assert right.top1_agreement == 1.0
    assert (wrong.mean_kl or 0) > 100 * (right.mean_kl or 0)


def test_the_original_weights_can_be_asked_for_and_their_error_is_reported(llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4), quantization="nf4", dtype="bfloat16")
    merge(tmp_path / "adapter", tmp_path / "default")
    report = merge(tmp_path / "adapter", tmp_path / "out", onto="original")
    other = read_report(tmp_path / "default")["weights"]
    assert report.weights["original"].model_dump() == pytest.approx(other["original"])
    assert report.weights["dequantized"].model_dump() == pytest.approx(other["dequantized"])
    assert other["original"]["rms_logit"] > 3 * other["dequantized"]["rms_logit"]


def test_a_quantized_base_can_stay_quantized_and_the_added_error_is_reported(llama: Path, tmp_path: Path) -> None:
    live = make_adapter(tmp_path / "adapter", llama, Lora(rank=4, targets=["q_proj"]), quantization="nf4")
    report = merge(tmp_path / "adapter", tmp_path / "out", onto="requantized")
    assert report.onto == "requantized"
    assert report.verification.changed_tensors == 2
    again, dense = report.weights["requantized"], report.weights["dequantized"]
    assert (again.rms_logit or 0) > 3 * (dense.rms_logit or 0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert plain.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert torch.isfinite(logits(plain, live.tokenizer)).all()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    codes = load_backbone(live.spec, LANGUAGE_HEAD).model.model.layers[0]
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], codes.mlp.up_proj.weight.data)
    assert not torch.equal(stored["model.layers.0.self_attn.q_proj.weight"], codes.self_attn.q_proj.weight.data)


@pytest.mark.parametrize("fault", ["not applied", "applied twice"])
def test_a_faulty_fold_is_caught_under_the_error_of_quantizing_again(
    fault: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=16, rslora=True), quantization="nf4", amount=0.1)
    spoil_fold(FOLD_FAULTS[fault], monkeypatch)
    with pytest.raises(VerificationFailed):
        merge(tmp_path / "adapter", tmp_path / "out", onto="requantized")


def test_asking_for_original_weights_of_an_unquantized_base_is_refused(llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4))
    with pytest.raises(InputError, match="would be ignored"):
        merge(tmp_path / "adapter", tmp_path / "out", onto="original")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # that is the case tested
def test_a_tied_embedding_that_was_trained_is_untied_in_the_merged_model(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", seed=0, tied=True)
    live = make_adapter(tmp_path / "adapter", base, Lora(rank=4, modules_to_save=["embed_tokens"]))
    merge(tmp_path / "adapter", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(plain, live.tokenizer) - logits(live.model, live.tokenizer)).abs().max() < 1e-4


@pytest.mark.parametrize("head", [SENTIMENT, LABELS, NUMBER], ids=lambda head: head.problem)
def test_a_classification_head_comes_along(head: Head, llama: Path, tmp_path: Path) -> None:
    live = make_adapter(tmp_path / "adapter", llama, Lora(rank=4), head=head)
    report = merge(tmp_path / "adapter", tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert plain.config.id2label == dict(enumerate(head.labels or ("value",)))
    assert (logits(plain, live.tokenizer) - logits(live.model, live.tokenizer)).abs().max() < 1e-4
    assert (report.verification.difference.mean_kl is None) == (head.problem == "regression")


def spoil_fold(spoil: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapter is spoilt before it is folded, by rows or by PEFT."""
    by_rows, by_peft = folding.row_fold, folding.fold_module

    def rows(wrapper: Any) -> Any:
        if by_rows(wrapper) is not None:
            spoil(wrapper)
        return by_rows(wrapper)

    def whole(wrapper: Any) -> Any:
        spoil(wrapper)
        return by_peft(wrapper)

    monkeypatch.setattr(folding, "row_fold", rows)
    monkeypatch.setattr(folding, "fold_module", whole)


def scaled(factor: float) -> Callable[[Any], None]:
    def spoil(wrapper: Any) -> None:
        for name, parameter in wrapper.named_parameters():
            if "lora_B" in name:
                parameter.data *= factor

    return spoil


def transposed(wrapper: Any) -> None:
    down, up = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    if down.shape == up.shape[::-1]:
        down.data, up.data = up.data.T.contiguous(), down.data.T.contiguous()


FOLD_FAULTS = {
    "not applied": scaled(0.0),
    "applied twice": scaled(2.0),
    "wrong scale": scaled(1 / 4),  # alpha / rank for alpha / sqrt(rank) at rank 16
    "slightly wrong scale": scaled(0.9),
    "transposed": transposed,
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("fault", FOLD_FAULTS)
def test_a_faulty_fold_is_caught(
    fault: str, quantization: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=16, rslora=True), quantization=quantization)
    spoil_fold(FOLD_FAULTS[fault], monkeypatch)
    with pytest.raises(VerificationFailed, match="does not answer like"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = MergeReport.model_validate(read_report(tmp_path / "out.rejected"))
    assert report.status == "rejected"
    assert report.verification.failures
    assert [path.name for path in (tmp_path / "out.rejected").iterdir()] == ["merge_report.json"]


@pytest.mark.parametrize("fault", ["not applied", "applied twice", "wrong scale", "transposed"])
def test_a_faulty_fold_is_caught_in_bfloat16_too(
    fault: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=16, rslora=True), dtype="bfloat16")
    spoil_fold(FOLD_FAULTS[fault], monkeypatch)
    with pytest.raises(VerificationFailed):
        merge(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("fault", ["not applied", "applied twice", "wrong scale"])
def test_a_delta_finer_than_bfloat16_survives_and_its_faults_are_still_caught(
    fault: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=16), dtype="bfloat16", amount=4e-4)
    found = merge(tmp_path / "adapter", tmp_path / "right")
    assert found.dithered_tensors == 14
    assert found.verification.difference.gain == pytest.approx(1, abs=0.2)  # nearest keeps less than half of it
    assert (found.verification.base.rms_logit or 0) < found.verification.tolerance.rms_difference
    spoil_fold(FOLD_FAULTS[fault], monkeypatch)
    with pytest.raises(VerificationFailed):
        merge(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop("score.weight"), "are missing in the files, such as score.weight"),
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "not finite"),
        (lambda tensors: tensors["score.weight"].mul_(-1), "a logit differs"),
    ],
    ids=["head missing", "not a number", "head corrupted"],
)
def test_a_spoilt_file_is_caught(
    spoil: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4), head=SENTIMENT)
    real = merging._write_beside

    def write(source: Any, folder: Path) -> None:
        real(source, folder)
        tensors = load_file(folder / "model.safetensors")
        spoil(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "_write_beside", write)
    monkeypatch.setattr(merging, "prove", lambda question, say: examine(question.model_copy(update={"digests": {}})))
    with pytest.raises(VerificationFailed, match=message):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("identity", [True, False])
def test_a_base_of_other_dimensions_is_refused(identity: bool, llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4), identity=identity)
    for index, shape in enumerate(({"hidden": 128}, {"layers": 1}, {"layers": 3})):
        other = write_llama(tmp_path / f"other{index}", seed=0, **shape)
        with pytest.raises(BackboneError, match=r"trained on .*tiny-llama"):
            merge(tmp_path / "adapter", tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_weights_is_refused_when_the_adapter_knows_its_own(llama: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", seed=5)
    make_adapter(tmp_path / "known", llama, Lora(rank=4))
    with pytest.raises(BackboneError, match="other weights"):
        merge(tmp_path / "known", tmp_path / "out", base=str(other))
    make_adapter(tmp_path / "unknown", llama, Lora(rank=4), identity=False)
    assert merge(tmp_path / "unknown", tmp_path / "out", base=str(other)).base.recognised_by == "shapes"


def test_a_base_that_moved_is_found_under_its_new_name(llama: Path, tmp_path: Path) -> None:
    moved = write_llama(tmp_path / "moved", seed=0)
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4))
    assert merge(tmp_path / "adapter", tmp_path / "out", base=str(moved)).base.recognised_by == "weights"


@pytest.mark.parametrize("method", [Prefix(virtual_tokens=4), Prompt(virtual_tokens=4)], ids=lambda method: method.kind)
def test_virtual_tokens_cannot_be_folded_and_the_message_says_what_to_deploy(
    method: Method, llama: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "adapter", llama, method)
    with pytest.raises(MethodError, match=r"PeftModel\.from_pretrained") as caught:
        merge(tmp_path / "adapter", tmp_path / "out")
    assert str(tmp_path / "adapter") in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_whole_model_needs_no_merge(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(llama)
    with pytest.raises(MethodError, match="can be deployed as it is"):
        merge(tmp_path / "run", tmp_path / "out")
    with pytest.raises(InputError, match="neither a finished run"):
        merge(tmp_path, tmp_path / "out")


def test_a_folder_in_use_is_left_alone(llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4))
    merge(tmp_path / "adapter", tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = merge(tmp_path / "adapter", tmp_path / "out")  # the very same merge: its report, and nothing is done
    assert again.verification.passed
    make_adapter(tmp_path / "other", llama, Lora(rank=8))
    with pytest.raises(OutputError, match="is not empty"):
        merge(tmp_path / "other", tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("stage", ["fold_by_tensor", "_write_beside", "prove", "render_card"])
def test_an_interrupted_merge_leaves_nothing(
    stage: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4))

    def interrupt(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_is_noticed_before_the_weights_are_read(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4))
    usage = merging.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda folder: usage._replace(free=2**20))
    monkeypatch.setattr(merging, "fold_by_tensor", lambda *arguments, **named: pytest.fail("the weights were read"))
    with pytest.raises(OutputError, match=r"1.0 MiB free"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_that_diverged_is_refused(llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", llama, Lora(rank=4))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PeftkitError, match="not finite"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_a_run_is_proven_on_its_own_validation_split_and_scored_on_its_test_split(llama: Path, tmp_path: Path) -> None:
    for name, first in (("train", 0), ("validation", 40), ("test", 60)):
        rows = [{"prompt": f"{n} and one is ", "completion": str(n + 1)} for n in range(first, first + 20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation", "test")}
    recipe = build_recipe(
        {
            "backbone": {"name": str(llama), "dtype": "float32"},
            "method": {"kind": "lora", "rank": 4},
            "task": "completion",
            "data": splits,
            "training": {"max_steps": 4, "learning_rate": 0.01},
        }
    )
    train(recipe, tmp_path / "run")
    report = merge(tmp_path / "run", tmp_path / "out", max_examples=15)
    assert report.recipe_digest == recipe.digest
    assert report.method == "lora"
    assert report.verification.prompts == "the validation and test splits"
    assert report.verification.difference.positions == 2 * 20 * 3  # two digits and the stop token of 41 to 60
    pair = report.verification.metrics["perplexity"]
    assert pair.n == 15
    assert pair.merged == pytest.approx(pair.adapter, rel=1e-5)
    assert f"| Recipe digest | {recipe.digest} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_real_encoder_merges_with_its_head(quantization: str, tmp_path: Path) -> None:
    make_adapter(
        tmp_path / "adapter", "minilm-l6", Lora(rank=8), head=SENTIMENT, quantization=quantization, dtype="bfloat16"
    )
    report = merge(tmp_path / "adapter", tmp_path / "out")
    assert report.verification.difference.top1_agreement == 1.0
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    if quantization == "nf4":
        assert (report.weights["original"].rms_logit or 0) > 3 * (report.weights["dequantized"].rms_logit or 0)


@pytest.mark.slow
def test_a_real_chat_model_merges_exactly(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", "smollm2-135m", Lora(rank=4, layers="top-4"))
    report = merge(tmp_path / "adapter", tmp_path / "out")
    assert report.verification.difference.top1_agreement == 1.0
    assert report.verification.changed_tensors == 4 * 7
