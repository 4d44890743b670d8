"""Simulated steps against the same steps on real tensors, on this machine's processor, by the bytes of storages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peftkit.backbones.load import load_backbone
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.plan.simulate import simulate
from peftkit.plan.simulation import Simulation, summarize
from peftkit.plan.sizes import fully_labelled
from peftkit.plan.steps import run_steps
from peftkit.plan.storages import StorageTracker
from peftkit.recipe import Recipe, build_recipe

SIZES = fully_labelled((40, 33, 12))
THREE = Head("classification", ("a", "b", "c"), "single_label_classification")
NO_DROPOUT = "training.dropout=0"  # on a real CPU numpy draws the masks, which the tracker does not see
Build = Callable[..., Recipe]


def real_step(recipe: Recipe, head: Head) -> Simulation:
    """The storages of the same steps on real tensors, where the tracker only watches."""
    backbone = load_backbone(recipe.backbone, head, dropout=recipe.training.dropout)
    tracker = StorageTracker()
    with quietly(), tracker:
        tracker.enter("load*")
        for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
            tracker.tag(tensor, "weights")
        run_steps(recipe, backbone, head, tracker, steps=(SIZES, SIZES), device="cpu")
    return summarize(tracker.stream, context_bytes=0, vocab=backbone.dims.vocab, on_card=False)


def require_alike(recipe: Recipe, head: Head) -> None:
    """Every phase peaks alike, within the hundredth that a few scalars may make."""
    fake, real = simulate(recipe, head, sizes=SIZES, device="cpu"), real_step(recipe, head)
    assert fake.phase_peaks == pytest.approx(real.phase_peaks, rel=0.01)
    assert {"forward", "backward", "optimizer", "evaluation"} <= set(fake.phase_peaks)
    assert fake.phase == real.phase


@pytest.mark.parametrize(
    "method",
    # the last draws a number in each forward to decide whether its layer is left out
    ["lora", "full", "prompt", "prefix", {"kind": "peft", "type": "IA3"}, {"kind": "peft", "type": "LOHA"}],
)
def test_a_chat_step_of_a_tiny_model(chat_recipe: Build, method: Any) -> None:
    require_alike(chat_recipe(method=method), LANGUAGE_HEAD)


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_classification_step_of_a_tiny_model(classify_recipe: Build, method: Any) -> None:
    require_alike(classify_recipe(NO_DROPOUT, method=method), THREE)


def recipe_of(backbone: str, task: str, method: str, *overrides: str) -> Recipe:
    content = {"backbone": {"name": backbone, "dtype": "float32"}, "method": method, "task": task}
    return build_recipe(content | {"data": {"train": "none.jsonl"}}, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "all"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt"])
def test_a_chat_step_of_smollm2(method: str, checkpointing: str) -> None:
    recipe = recipe_of("smollm2-135m", "chat", method, f"training.checkpointing={checkpointing}")
    require_alike(recipe, LANGUAGE_HEAD)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "all"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt", "head"])
def test_a_classification_step_of_minilm(method: str, checkpointing: str) -> None:
    recipe = recipe_of("minilm-l6", "classify", method, NO_DROPOUT, f"training.checkpointing={checkpointing}")
    require_alike(recipe, THREE)
