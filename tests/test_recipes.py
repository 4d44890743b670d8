"""Every preset is read, checked and dry-run: its method is put on a model without storage, of the real config."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from peftkit import presets
from peftkit.backbones.configs import bundled_config
from peftkit.backbones.dims import Dims
from peftkit.backbones.packaged import PACKAGED
from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.recipe import Recipe, load_recipe, recipe_schema
from peftkit.units import GIB

FOLDER = Path(__file__).parent.parent / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
CARDS = [name for name in NAMES if name.startswith("card-")]
SENTIMENT = Head("classification", ("negative", "positive"), "single_label_classification")
PUBLISHED_PARAMETERS = {
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "microsoft/phi-4": 14_659_507_200,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
}
"""Weights in each model's published safetensors files, tied ones once."""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


def head_of(recipe: Recipe) -> Head:
    return SENTIMENT if recipe.task.kind == "classify" else LANGUAGE_HEAD


def dims_of(recipe: Recipe) -> Dims:
    from peftkit.backbones import load

    return load.dims_of(recipe.backbone, head_of(recipe))


def test_every_promised_preset_is_there() -> None:
    assert {f"classify-{kind}" for kind in ("full", "lora", "qlora", "prefix", "prompt", "head")} <= set(NAMES)
    assert {f"chat-{kind}" for kind in ("full", "lora", "qlora", "prefix", "prompt")} <= set(NAMES)
    for size in (8, 12, 16, 24):
        assert sum(name.startswith(f"card-{size}gb-") for name in CARDS) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_preset_begins_with_the_editor_line_and_says_what_it_is_for(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=./schema.json"
    comment = [line for line in lines[1:] if line.startswith("#")]
    assert len(" ".join(comment)) > 100
    assert max(len(line) for line in lines) <= 120
    assert 10 < len(recipe_of(name).description) <= 80


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_named_after_its_method(name: str) -> None:
    assert recipe_of(name).label in name.split("-") or name == "demo-chat"


@pytest.mark.parametrize("name", NAMES)
def test_preset_trains_as_many_parameters_as_its_method_counts(name: str) -> None:
    import torch

    from peftkit.backbones import load

    recipe = recipe_of(name)
    dims = dims_of(recipe)
    recipe.method.check(dims, recipe.task.kind, recipe.backbone.quantization)
    skeleton = load.build_skeleton(dims.config, head_of(recipe))
    backbone = load.Backbone(
        model=skeleton, tokenizer=None, dims=dims, spec=recipe.backbone, folder="", compute_dtype=torch.bfloat16
    )
    attached = recipe.method.attach(backbone).trainable()
    assert sum(parameter.numel() for parameter in attached.values()) == recipe.method.trainable_params(dims) > 0


@pytest.mark.parametrize("name", sorted(PUBLISHED_PARAMETERS))
def test_bundled_config_builds_the_published_model(name: str) -> None:
    from transformers import AutoConfig

    from peftkit.backbones import load

    path = bundled_config(name)
    assert path is not None
    skeleton = load.build_skeleton(AutoConfig.from_pretrained(str(path)), LANGUAGE_HEAD)
    assert sum(parameter.numel() for parameter in skeleton.parameters()) == PUBLISHED_PARAMETERS[name]


def test_configs_are_bundled_for_exactly_the_models_that_presets_name() -> None:
    named = {recipe_of(name).backbone.name for name in NAMES}
    hub = {name for name in named if "/" in name}
    assert hub == set(PUBLISHED_PARAMETERS)
    folder = Path(str(bundled_config("Qwen/Qwen3-8B"))).parent
    assert {path.stem.replace("--", "/") for path in folder.glob("*.json")} == hub | set(PACKAGED)
    assert bundled_config("Qwen/Qwen3-9B") is None


def weight_bytes(recipe: Recipe, dims: Dims) -> float:
    """Backbone weights on the card: float32 when all train, else two bytes, NF4 linear layers 0.516 bytes a weight."""
    if recipe.method.trainable_params(dims) == dims.num_params:
        return 4 * dims.num_params
    in_linears = sum(linear.in_features * linear.out_features for linear in dims.linears)
    packed = in_linears if recipe.backbone.quantization == "nf4" else 0
    return 2 * (dims.num_params - packed) + 0.516 * packed


@pytest.mark.parametrize("name", CARDS)
def test_card_preset_states_its_memory_and_leaves_room_for_activations(name: str) -> None:
    recipe = recipe_of(name)
    dims = dims_of(recipe)
    text = " ".join((FOLDER / f"{name}.yaml").read_text(encoding="utf-8").replace("\n# ", " ").split())
    card = float(name.split("-")[1].removesuffix("gb"))
    (weights,) = re.findall(r"in GiB: weights ([\d.]+) ", text)
    ((total, available),) = re.findall(r"In all about ([\d.]+) .* the card has ([\d.]+) to give", text)
    assert float(weights) == pytest.approx(weight_bytes(recipe, dims) / GIB, abs=0.06), "rounded to one decimal"
    assert card - 0.5 >= float(available) >= float(total) + 0.5

    # Gradient and AdamW moments: 12 bytes a trained weight, 6 with 8-bit moments; an adapter's own weights are 4 more.
    trained = recipe.method.trainable_params(dims)
    moments = 6 if "8bit" in recipe.training.optimizer else 12
    adapter = 4 * trained if trained < dims.num_params else 0
    lasting = weight_bytes(recipe, dims) + moments * trained + adapter
    # The logits in 16 bits, their float32 copy, and a gradient for each.
    logits = 12 * recipe.training.max_tokens * dims.vocab
    assert (lasting + logits) / GIB < float(total) < 0.9 * card
    assert recipe.training.micro_batch == f"{recipe.training.max_tokens} tokens"
    assert recipe.training.checkpointing == "all"
    assert f"up to {recipe.training.max_tokens} tokens" in text


def test_schema_is_that_of_the_recipe() -> None:
    written = json.loads((FOLDER / presets.SCHEMA_NAME).read_text(encoding="utf-8"))
    assert written == recipe_schema(), "stale: run `python -m peftkit.presets`"
