"""Every fast path gives the run that the plain path gives, and every switch turns its own off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from peftkit.errors import InputError, MethodError
from peftkit.kernels.spec import Kernels
from peftkit.prepare import prepare
from peftkit.recipe import Recipe
from peftkit.record import RunRecord
from peftkit.run import train
from peftkit.train.fastpath import FastPath
from peftkit.train.progress import PlainObserver

SWITCHES = tuple(Kernels.model_fields)
OFF = tuple(f"training.kernels.{name}=false" for name in SWITCHES)
STEADY = (
    "training.max_steps=3",
    "training.batch_size=4",
    "training.warmup=0",
    "training.schedule=constant",
    "training.learning_rate=1e-3",
    "evaluation.every=never",
)
STILL = "training.dropout=0"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def weights(record: RunRecord, folder: Path) -> dict[str, torch.Tensor]:
    (name,) = record.artifacts
    return load_file(folder / name / ("model.safetensors" if name == "model" else "adapter_model.safetensors"))


def assert_same_run(plain: Recipe, fast: Recipe, folder: Path) -> None:
    """Three float32 steps of Adam at 1e-3: a gradient off by 1e-6 of itself moves a weight by as little of 1e-3, unless
    it is so near zero that rounding decides its sign; so the bound is a tenth of one step."""
    one, other = train(plain, folder / "plain"), train(fast, folder / "fast")
    assert one.loss is not None
    assert other.loss is not None
    assert other.loss.first == pytest.approx(one.loss.first, rel=1e-5)
    assert other.loss.last == pytest.approx(one.loss.last, rel=1e-4)
    assert other.loss.validation == pytest.approx(one.loss.validation, rel=1e-4)
    before, after = weights(one, folder / "plain"), weights(other, folder / "fast")
    assert before.keys() == after.keys()
    blind = "key.bias"  # softmax does not see it: its gradient is rounding alone, which Adam makes whole steps of
    moved = {name: float((before[name] - after[name]).abs().max()) for name in before if not name.endswith(blind)}
    assert max(moved.values()) < 1e-4, moved


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt"])
def test_a_fast_chat_run_is_the_plain_run(method: str, chat_recipe: Any, tmp_path: Path) -> None:
    assert_same_run(chat_recipe(*STEADY, *OFF, method=method), chat_recipe(*STEADY, method=method), tmp_path)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt", "head"])
def test_a_fast_classification_run_is_the_plain_run(method: str, classify_recipe: Any, tmp_path: Path) -> None:
    plain = classify_recipe(*STEADY, *OFF, STILL, method=method)
    assert_same_run(plain, classify_recipe(*STEADY, STILL, method=method), tmp_path)


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_fast_path_alone_gives_the_plain_run(switch: str, chat_recipe: Any, tmp_path: Path) -> None:
    alone = [setting for setting in OFF if not setting.startswith(f"training.kernels.{switch}=")]
    assert_same_run(chat_recipe(*STEADY, *OFF), chat_recipe(*STEADY, *alone), tmp_path)


@pytest.fixture
def unknown(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose architecture no fast path knows."""
    folder = tmp_path / "gpt_neox"
    vocabulary = AutoConfig.from_pretrained(tiny_llama).vocab_size
    config = AutoConfig.for_model("gpt_neox", **SMALL, vocab_size=vocabulary)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in [*tiny_llama.glob("tokenizer*"), *tiny_llama.glob("*.jinja")]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def opened(recipe: Recipe) -> tuple[Any, FastPath, list[str]]:
    model = prepare(recipe, PlainObserver(), device=torch.device("cpu")).adapted.model
    said: list[str] = []
    fast = FastPath.open(model, recipe.training.kernels, attention=recipe.backbone.attention, pad_id=0, say=said.append)
    return model, fast, said


def test_all_switches_off_leave_the_models_own_modules(chat_recipe: Any) -> None:
    model, fast, said = opened(chat_recipe(*OFF))
    assert not any("forward" in vars(module) for module in model.modules())
    assert (fast.packed, fast.products, fast.fused_loss, said) == (False, False, False, [])


def test_all_switches_on_replace_what_they_know(chat_recipe: Any) -> None:
    model, fast, said = opened(chat_recipe())
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert all("forward" in vars(layer) for layer in layers)
    assert (fast.packed, fast.products, fast.fused_loss) == (True, True, True)
    assert f"{len(layers)} LoRA layers fused" in said[0]


def test_an_unknown_architecture_says_that_it_runs_on_the_plain_path(chat_recipe: Any, unknown: Path) -> None:
    _, fast, said = opened(chat_recipe(f"backbone.name={unknown}"))
    assert not fast.packed
    assert not fast.fused_loss
    assert any("training.kernels.packing is off: the architecture 'gpt_neox'" in line for line in said)
    assert any("training.kernels.loss is off" in line for line in said)


def test_prefix_tuning_recomputes_activations_in_the_packed_forward(chat_recipe: Any, tmp_path: Path) -> None:
    recomputing = chat_recipe(*STEADY, "training.checkpointing=all", method="prefix")
    assert_same_run(chat_recipe(*STEADY, method="prefix"), recomputing, tmp_path)


def test_prefix_tuning_refuses_to_recompute_what_it_cannot(chat_recipe: Any, unknown: Path, tmp_path: Path) -> None:
    recipe = chat_recipe(f"backbone.name={unknown}", "training.checkpointing=all", method="prefix")
    with pytest.raises(MethodError, match="packed batches"):
        train(recipe, tmp_path / "run")


def test_a_run_from_cached_activations_is_the_plain_run(
    chat_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTKIT_HOME", str(tmp_path / "home"))
    top = ("method.layers=top-1", *STEADY)
    assert_same_run(chat_recipe(*top), chat_recipe(*top, "training.activation_cache=true"), tmp_path)
    assert list((tmp_path / "home" / "activations").glob("*/whole/hidden.bin"))


def test_a_cache_that_would_not_be_exact_is_refused(classify_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.dropout=0"):
        train(classify_recipe("training.activation_cache=true", method="head"), tmp_path / "run")


def test_offloading_is_refused_where_it_would_move_nothing(chat_recipe: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match=r"training\.offload_activations=false"):
        train(chat_recipe("training.offload_activations=true"), tmp_path / "run")
