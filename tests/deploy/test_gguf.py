"""GGUF files: every supported architecture against llama.cpp itself, planted faults, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit.backbones import local_path
from peftkit.backbones.quiet import quietly
from peftkit.cli import main
from peftkit.deploy import export as exporting
from peftkit.deploy import gguf_file, parity
from peftkit.deploy.export import ExportReport, export, read_model
from peftkit.deploy.gguf_file import file_bytes, write_model
from peftkit.deploy.gguf_kinds import KINDS
from peftkit.deploy.gguf_layout import LAYOUTS
from peftkit.deploy.gguf_vocab import read_vocabulary
from peftkit.deploy.llama_cpp import is_installed
from peftkit.deploy.merge import merge
from peftkit.deploy.parity import PROMPTS, check_gguf
from peftkit.errors import BackboneError, MethodError, OutputError, VerificationFailed

Make = Callable[..., Path]
FEW = PROMPTS[:5]
needs_engine = pytest.mark.skipif(not is_installed(), reason="llama.cpp (xllamacpp) is not installed")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LOCAL = {"sliding_window": 16, "query_pre_attn_scalar": 8}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-untied": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "llama3-rope": (
        "Llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0, "original_max_position_embeddings": 16}},
    ),
    "mistral-wide-heads": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", LOCAL | {"head_dim": 8}),
    "gemma3": ("Gemma3", LOCAL | {"head_dim": 8, "num_hidden_layers": 6}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {"tie_word_embeddings": False, "sliding_window": None}),
}


def load(folder: Path) -> Any:
    with quietly():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write(folder: Path, out: Path, kind: str = "f32") -> Path:
    write_model(read_model(folder, folder.name), kind, out)
    return out


@needs_engine
@pytest.mark.parametrize("case", TINY)
def test_every_architecture_answers_in_llama_cpp_as_in_torch(
    case: str, save_tiny: Make, small_tokenizer: Any, tmp_path: Path
) -> None:
    family, settings = TINY[case]
    folder = save_tiny(tmp_path / "model", family, small_tokenizer, **settings)
    file = write(folder, tmp_path / "model.gguf")
    found = check_gguf(load(folder), small_tokenizer, "f32", file, prompts=FEW)
    assert found.failures == ()
    assert found.status == "ok"
    assert found.same_tokens == len(FEW)
    assert found.mean_kl is not None
    assert found.mean_kl < 1e-6  # float32 on both sides


def test_the_table_of_architectures_is_what_is_tested() -> None:
    assert {f"{family}ForCausalLM" for family, _ in TINY.values()} == set(LAYOUTS)


@needs_engine
@pytest.mark.parametrize("space_first", [False, True])
def test_a_sentencepiece_tokenizer_gives_the_same_tokens_and_bos_once(
    save_tiny: Make, make_sentencepiece: Any, space_first: bool, tmp_path: Path
) -> None:
    tokenizer = make_sentencepiece(space_first=space_first)
    folder = save_tiny(tmp_path / "model", "Gemma", tokenizer, head_dim=8)
    file = write(folder, tmp_path / "model.gguf")
    assert "<s>" in tokenizer.chat_template.replace("bos_token", "<s>")  # the template writes BOS, and so does the file
    found = check_gguf(load(folder), tokenizer, "f32", file, prompts=(*FEW, "éß — 水"))
    assert found.failures == ()
    assert found.same_tokens == len(FEW) + 1


@needs_engine
def test_a_lora_alone_answers_on_its_base_as_peft_does(make_lora: Make, small_llama: Path, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}
    folder = make_lora(tmp_path / "tuned", base=small_llama, **patterns)
    report = export(folder, "gguf", tmp_path / "out")
    assert report.parity.identical_answers == report.parity.prompts == len(PROMPTS)
    assert list(report.files) == ["tuned-lora.gguf"]
    base = write(small_llama, tmp_path / "base.gguf")
    adapted = PeftModel.from_pretrained(load(small_llama), folder).eval()
    bare = check_gguf(adapted, AutoTokenizer.from_pretrained(small_llama), "f32", base, prompts=FEW)
    assert bare.status == "failed"  # without the LoRA these are other answers


@needs_engine
def test_a_merged_model_runs_in_llama_cpp_from_the_exported_file(
    make_lora: Make, small_llama: Path, tmp_path: Path
) -> None:
    merge(make_lora(tmp_path / "adapter", base=small_llama), tmp_path / "merged")
    report = export(tmp_path / "merged", "gguf", tmp_path / "out", kind="f32")
    assert report.parity.status == "ok"
    assert report.parity.identical_answers == len(PROMPTS)


def no_permutation(layout: Any, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def another_template(writer: Any, vocabulary: Any, tokenizer: Any, stops: Any) -> None:
    from peftkit.deploy.gguf_vocab import write_vocabulary

    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    write_vocabulary(writer, vocabulary, tokenizer, stops)


def another_epsilon(writer: Any, *rest: Any) -> list[str]:
    from peftkit.deploy.gguf_layout import describe_architecture

    notes = describe_architecture(writer, *rest)
    writer.kv_data[0]["llama.attention.layer_norm_rms_epsilon"].value = 0.1
    return notes


@needs_engine
@pytest.mark.parametrize(
    ("target", "fault", "told"),
    [
        ("place", no_permutation, "greedy answers differ"),
        ("write_vocabulary", another_template, "prompts have other tokens"),
        ("describe_architecture", another_epsilon, "the mean KL divergence is"),
    ],
)
def test_a_planted_fault_is_caught_and_nothing_is_left(
    target: str, fault: Any, told: str, small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gguf_file, target, fault)
    if fault is another_template:
        reload_tokenizer(monkeypatch)
    assert main(["export", str(small_llama), "--to", "gguf", "--out", str(tmp_path / "out")]) == 1
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.rejected"]
    report = json.loads((tmp_path / "out.rejected" / "export_report.json").read_text())
    assert report["status"] == "rejected"


def reload_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's side asks a tokenizer of its own, as the fault spoils the one that is written."""
    ask = exporting.check_gguf

    def fresh(model: Any, tokenizer: Any, *rest: Any) -> Any:
        return ask(model, AutoTokenizer.from_pretrained(model.config._name_or_path), *rest)

    monkeypatch.setattr(exporting, "check_gguf", fresh)


def test_without_llama_cpp_another_reader_reads_the_file_and_the_report_says_so(
    small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "is_installed", lambda: False)
    report = export(small_llama, "gguf", tmp_path / "out")
    assert report.parity.status == "not checked"
    assert "pip install" in str(report.parity.reason)
    assert report.parity.engine == "transformers' GGUF reader"
    assert report.parity.top1_agreement == 1.0
    written = ExportReport.model_validate_json((tmp_path / "out" / "export_report.json").read_text())
    assert written == report
    monkeypatch.setattr(gguf_file, "place", no_permutation)
    with pytest.raises(VerificationFailed, match="mean KL divergence"):
        export(small_llama, "gguf", tmp_path / "wrong")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_weights_within_its_grid(
    kind: str, small_llama: Path, small_tokenizer: Any, tmp_path: Path
) -> None:
    """A rounded weight is off by at most half a step of a grid over the matrix, in units of its largest weight."""
    if kind == "q4_k_m" and not is_installed():
        pytest.skip("K-quants are written by llama.cpp")
    model = read_model(small_llama, "tiny")
    file = write(small_llama, tmp_path / "model.gguf", kind)
    assert file.stat().st_size <= file_bytes(model, kind)
    source = load_file(small_llama / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    held = tensors["blk.0.ffn_down.weight"]
    restored = torch.tensor(gguf.dequantize(held.data, held.tensor_type))
    bits = {"f32": 24, "f16": 11, "bf16": 8, "q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4, "q4_k_m": 5}[kind]
    worst = float((restored - source).abs().max() / source.abs().max())
    assert worst <= 1.05 * 2.0 ** (1 - bits)
    assert worst > 0 or kind == "f32"
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


@needs_engine
def test_k_quants_mix_six_bits_into_four_where_llama_cpp_does(
    save_tiny: Make, small_tokenizer: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.05}
    folder = save_tiny(tmp_path / "model", "Llama", small_tokenizer, **sizes)
    file = write(folder, tmp_path / "model.gguf", "q4_k_m")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["token_embd.weight"] == "Q6_K"  # it is the head too
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_up.weight"] == "Q4_K"
    assert types["blk.1.ffn_down.weight"] == types["blk.1.attn_v.weight"] == "Q6_K"  # 1 >= 7 * 2 // 8
    found = check_gguf(load(folder), small_tokenizer, "q4_k_m", file, prompts=FEW)
    assert found.same_tokens == len(FEW)
    assert found.mean_kl is not None
    assert 1e-6 < found.mean_kl < 0.5


def test_padding_rows_get_words_of_their_own_and_missing_rows_are_refused(small_tokenizer: Any) -> None:
    count = len(small_tokenizer)
    found = read_vocabulary(small_tokenizer, count + 2, "tiny")
    assert found.tokens[-2:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert found.types[-1] == gguf.TokenType.UNUSED
    assert found.types[0] == gguf.TokenType.CONTROL
    with pytest.raises(BackboneError, match="resize_token_embeddings"):
        read_vocabulary(small_tokenizer, count - 1, "tiny")


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("Llama", {"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary scaling is dynamic",
        ),
        ("Gemma2", LOCAL | {"head_dim": 8, "query_pre_attn_scalar": 99}, "scales queries by 1/sqrt(99)"),
        ("Gemma2", LOCAL | {"head_dim": 8, "layer_types": ["full_attention"] * 2}, "do not alternate"),
        ("GPTNeoX", {"tie_word_embeddings": False}, "GPTNeoXForCausalLM, which peftkit does not write as GGUF"),
    ],
)
def test_what_llama_cpp_would_ignore_is_refused(
    family: str, settings: dict[str, Any], told: str, save_tiny: Make, small_tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    folder = save_tiny(tmp_path / "model", family, small_tokenizer, **settings)
    assert main(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    caught = capsys.readouterr()
    assert told in caught.err
    assert caught.out == ""
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_splits_in_a_way_of_its_own_is_refused(small_tokenizer: Any, small_llama: Path) -> None:
    from tokenizers import pre_tokenizers

    odd = AutoTokenizer.from_pretrained(small_llama)
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("-", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(BackboneError, match="splits text by"):
        read_vocabulary(odd, len(odd), "odd")
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    assert read_vocabulary(odd, len(odd), "odd").split == "smollm"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["BERT", "--to", "gguf"], "--to onnx"),
        (["no/such", "--to", "gguf"], "Fetch it first"),
        (["nowhere", "--to", "gguf"], "is no folder"),
        (["MODEL", "--to", "gguf", "--kind", "q3"], "invalid choice"),
        (["MODEL", "--to", "gguf", "--base", "x"], "--base would be ignored"),
        (["MODEL", "--to", "onnx", "--kind", "f16"], "--kind f16 would be ignored"),
        (["MODEL"], "one of the arguments --to --for is required"),
        (["MODEL", "--for", "vllm"], "is a whole model"),
        (["MODEL", "--for", "vllm", "--kind", "f16"], "--kind would be ignored"),
        (["DORA", "--to", "gguf"], "cannot be written as a GGUF LoRA: use_dora=True"),
        (["LORA", "--to", "gguf", "--kind", "f16"], "a LoRA alone is written in f32"),
        (["LORA", "--to", "onnx"], "no place for an adapter"),
    ],
)
def test_wrong_input_is_one_message_and_leaves_nothing(
    arguments: list[str],
    told: str,
    small_llama: Path,
    tiny_bert: Path,
    make_lora: Make,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"MODEL": small_llama, "BERT": tiny_bert}
    if arguments[0] in ("LORA", "DORA"):
        known[arguments[0]] = make_lora(tmp_path / "adapter", base=small_llama, use_dora=arguments[0] == "DORA")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["export", *(str(known.get(word, word)) for word in arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    caught = capsys.readouterr()
    assert code == 2
    assert told in caught.err
    assert caught.out == ""
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_a_head_is_no_place_for_a_gguf_lora(
    make_lora: Make, save_tiny: Make, small_tokenizer: Any, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", "Llama", small_tokenizer, tie_word_embeddings=False)
    folder = make_lora(tmp_path / "adapter", base=base, target_modules=["lm_head"])
    with pytest.raises(MethodError, match="lm_head"):
        export(folder, "gguf", tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(
    small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"1\.0 MiB free and the export needs"):
        export(small_llama, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_missing_or_broken_is_named(small_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_llama, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="cannot be read"):
        export(folder, "gguf", tmp_path / "out")
    weights.unlink()
    with pytest.raises(BackboneError, match=r"has no model\.safetensors"):
        export(folder, "gguf", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("moment", ["first tensor", "last tensor", "report", "rename"])
def test_killed_at_any_moment_it_leaves_no_output_and_the_next_call_succeeds(
    moment: str, small_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:  # the copy of this process dies in the middle of its export
        die_at(moment)
        export(small_llama, "gguf", out, parity=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not out.exists()
    assert all(path.name.startswith(".partial-") for path in tmp_path.iterdir())
    assert export(small_llama, "gguf", out, parity=False).status == "ok"
    assert len(gguf.GGUFReader(next(out.glob("*.gguf"))).tensors) == 20  # 9 a block, the embedding, the last norm


def die_at(moment: str) -> None:
    """Make this process kill itself there."""

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "report":
        exporting.write_json = kill
    if moment == "rename":
        os.replace = kill
    if moment.endswith("tensor"):
        count = [0]
        encode = gguf_file._encoded

        def counted(values: Any, kind: Any) -> Any:
            count[0] += 1
            if count[0] == (1 if moment.startswith("first") else 20):
                kill()
            return encode(values, kind)

        gguf_file._encoded = counted


@needs_engine
@pytest.mark.slow
def test_the_packaged_chat_model_answers_in_llama_cpp_as_in_torch(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["export", "smollm2-135m", "--to", "gguf", "--kind", "f32", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["parity"]
    assert found["same_tokens"] == found["prompts"] == len(PROMPTS) >= 20
    assert found["mean_kl"] < 1e-6
    assert found["identical_answers"] + found["swapped_ties"] == len(PROMPTS)
    assert report == json.loads((out / "export_report.json").read_text())
    small = write(local_path("smollm2-135m"), tmp_path / "small.gguf", "q8_0")
    tokenizer = AutoTokenizer.from_pretrained(local_path("smollm2-135m"))
    rounded = check_gguf(load(local_path("smollm2-135m")), tokenizer, "q8_0", small, prompts=FEW)
    assert rounded.same_tokens == len(FEW)
    assert 1e-5 < rounded.mean_kl < 0.02  # 0.005 over all prompts
