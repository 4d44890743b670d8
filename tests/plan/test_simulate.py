"""A step on fake tensors against the same step on real ones, and against what its parts must weigh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from peftkit.backbones.load import load_backbone
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.errors import InputError
from peftkit.plan.cuda_operators import Architecture
from peftkit.plan.peer import PeerSettings, simulate_peer
from peftkit.plan.simulate import run_steps, simulate
from peftkit.plan.simulation import Simulation, summarize
from peftkit.plan.storages import StorageTracker
from peftkit.recipe import Recipe
from peftkit.units import MIB

LENGTHS = (40, 33, 12)
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
        run_steps(recipe, backbone, head, tracker, lengths=LENGTHS, device="cpu")
    return summarize(tracker.stream, context_bytes=0, vocab=backbone.dims.vocab, on_card=False)


@pytest.mark.parametrize("method", ["lora", "full", "prompt", "prefix", {"kind": "peft", "type": "IA3"}])
def test_a_fake_chat_step_peaks_where_the_real_one_does(chat_recipe: Build, method: Any) -> None:
    recipe = chat_recipe(method=method)
    fake = simulate(recipe, LANGUAGE_HEAD, lengths=LENGTHS, device="cpu")
    real = real_step(recipe, LANGUAGE_HEAD)
    # same code, same shapes: what differs is a few scalars
    assert fake.allocated_bytes == pytest.approx(real.allocated_bytes, rel=0.01)
    assert fake.phase == real.phase


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_fake_classification_step_peaks_where_the_real_one_does(classify_recipe: Build, method: Any) -> None:
    recipe = classify_recipe(NO_DROPOUT, method=method)
    fake, real = simulate(recipe, THREE, lengths=LENGTHS, device="cpu"), real_step(recipe, THREE)
    assert fake.allocated_bytes == pytest.approx(real.allocated_bytes, rel=0.01)


def test_the_terms_sum_to_the_total(chat_recipe: Build) -> None:
    found = simulate(chat_recipe(), LANGUAGE_HEAD, lengths=LENGTHS)
    assert sum(found.terms.values()) == found.total_bytes
    assert found.reserved_bytes >= found.allocated_bytes


def test_adam_holds_two_moments_of_every_trained_weight(chat_recipe: Build) -> None:
    found = simulate(chat_recipe(), LANGUAGE_HEAD, lengths=LENGTHS, device="cpu")
    steps = 4 * 7 * 2 * 2  # one float32 counter for each A and B of the seven layers of two blocks
    assert found.terms["optimizer state"] == 2 * found.terms["adapters"] + steps


def test_nf4_packs_two_weights_a_byte_and_unpacks_one_layer_at_a_time(chat_recipe: Build) -> None:
    recipe = chat_recipe("backbone.quantization=nf4", "backbone.dtype=float32")
    config = AutoConfig.from_pretrained(recipe.backbone.name)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * hidden // config.num_attention_heads
    weights = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    found = simulate(recipe, LANGUAGE_HEAD, lengths=LENGTHS)
    assert found.terms["weights, quantized"] == weights // 2


def test_int8_is_refused_with_the_remedy(chat_recipe: Build) -> None:
    with pytest.raises(InputError, match="nf4"):
        simulate(chat_recipe("backbone.quantization=int8"), LANGUAGE_HEAD, lengths=LENGTHS)


def test_eager_attention_holds_scores_that_fused_attention_does_not(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)
    length, batch = 256, 2

    def held(attention: Any) -> int:
        settings = PeerSettings(batch=batch, lengths=(length,) * 2, attention=attention, precision="fp16")
        return simulate_peer(settings, config).terms["activations: attention"]

    # saved for the backward pass: float32 chances and their float16 copy
    scores = batch * config.num_attention_heads * length**2
    # within 5 %: queries, keys and values are copied differently, and are 32 times smaller
    assert held("eager") - held("sdpa") == pytest.approx(config.num_hidden_layers * scores * (4 + 2), rel=0.05)


@pytest.mark.slow
def test_a_published_run_on_a_t4_is_predicted() -> None:
    """SmolLM2-135M, two examples of 512 tokens, LoRA of rank 32 on the attention, float16, checkpointing: 1026.9 MiB
    allocated and 1070 reserved were measured (benchmarks/reference)."""
    from peft import LoraConfig
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        head_dim=64,
        tie_word_embeddings=True,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = PeerSettings(
        batch=2,
        lengths=(512, 512),
        precision="fp16",
        repeat_heads=True,
        checkpointing=True,
        loads_on_device=False,
        adapter=LoraConfig(r=32, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM"),
        architecture=Architecture((7, 5)),
    )
    found = simulate_peer(settings, config)
    # the step's tensors are all followed: what is left are rounding and the driver's own choices
    assert found.allocated_bytes / MIB == pytest.approx(1026.919, rel=0.005)
    assert found.reserved_bytes / MIB == pytest.approx(1070, rel=0.02)
