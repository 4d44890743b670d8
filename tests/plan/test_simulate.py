"""A simulated step against what its parts must weigh and do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from peftkit.backbones.load import build_skeleton, dims_of
from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.errors import InputError
from peftkit.plan import on_card
from peftkit.plan.cuda_operators import Architecture
from peftkit.plan.estimate import Rates, step_seconds
from peftkit.plan.peer import PeerSettings, simulate_peer
from peftkit.plan.simulate import open_trace, simulate
from peftkit.plan.simulation import Simulation
from peftkit.plan.sizes import Size, fully_labelled
from peftkit.plan.storages import Stream
from peftkit.recipe import Recipe
from peftkit.units import MIB

SIZES = fully_labelled((40, 33, 12))
LABELLED = sum(size.labelled for size in SIZES)
CARD = Architecture((8, 9))
Build = Callable[..., Recipe]


def params_of(config: Any) -> int:
    return sum(parameter.numel() for parameter in build_skeleton(config, LANGUAGE_HEAD).parameters())


def test_the_terms_sum_to_the_total(chat_recipe: Build) -> None:
    found = simulate(chat_recipe(), LANGUAGE_HEAD, sizes=SIZES)
    assert sum(found.terms.values()) == found.total_bytes
    assert found.reserved_bytes >= found.allocated_bytes


def test_adam_holds_two_moments_of_every_trained_weight(chat_recipe: Build) -> None:
    found = simulate(chat_recipe(), LANGUAGE_HEAD, sizes=SIZES, device="cpu")
    steps = 4 * 7 * 2 * 2  # one float32 counter for each A and B of the seven layers of two blocks
    assert found.terms["optimizer state"] == 2 * found.terms["adapters"] + steps


def test_tied_weights_that_are_widened_stay_one(chat_recipe: Build, tiny_llama: Path) -> None:
    # bfloat16 files, float32 weights: the embedding is the output layer too, and trains once
    recipe = chat_recipe("backbone.dtype=bfloat16", method="full")
    dims = dims_of(recipe.backbone, LANGUAGE_HEAD)
    found = simulate(recipe, LANGUAGE_HEAD, sizes=SIZES)
    tensors = 1 + 2 * 9 + 1  # each has a float32 counter: the embedding, nine of each block, the last norm
    assert found.terms["optimizer state"] == 2 * 4 * dims.num_params + 4 * tensors


def test_nf4_packs_two_weights_a_byte_and_unpacks_one_layer_at_a_time(chat_recipe: Build) -> None:
    recipe = chat_recipe("backbone.quantization=nf4", "backbone.dtype=float32")
    config = AutoConfig.from_pretrained(recipe.backbone.name)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * hidden // config.num_attention_heads
    weights = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    found = simulate(recipe, LANGUAGE_HEAD, sizes=SIZES)
    assert found.terms["weights, quantized"] == weights // 2


@pytest.mark.parametrize("fused", ["true", "false"])
def test_products_with_packed_weights_are_work_like_any(chat_recipe: Build, fused: str) -> None:
    # unpacked beside a plain product where LoRA is fused, and inside bitsandbytes' own product where it is not
    overrides = [f"training.kernels.lora={fused}", "backbone.dtype=float16"]
    dense, packed = (
        simulate(chat_recipe(*overrides, f"backbone.quantization={kind}"), LANGUAGE_HEAD, sizes=SIZES)
        for kind in ("none", "nf4")
    )
    assert packed.flops == dense.flops


def test_lora_is_simulated_as_it_runs_fused(chat_recipe: Build) -> None:
    # PEFT would call A and B by themselves; hooks on them would make it
    for overrides in ([], ["backbone.quantization=nf4"]):
        stream = step_stream(chat_recipe(*overrides))
        assert not [birth for birth in stream.births if "lora_A" in birth.module and birth.phase != "load*"]


def test_masks_of_adapter_dropout_are_drawn_as_on_the_card(chat_recipe: Build) -> None:
    recipe = chat_recipe("method.dropout=0.1", "backbone.dtype=float16")

    def compared(card: Architecture | None) -> int:
        return sum(birth.operator.startswith("aten.ge") for birth in step_stream(recipe, card).births)

    # the host compares the words of its generator, four elements each; a card draws every element
    assert compared(None) > 0 == compared(CARD)


def test_the_fused_loss_is_a_phase_with_two_products(chat_recipe: Build, tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)
    found = simulate(chat_recipe(), LANGUAGE_HEAD, sizes=SIZES)
    # logits, and the gradient of the hidden states; the output layer itself is frozen
    assert found.flops["loss"] == 2 * (2 * LABELLED * config.vocab_size * config.hidden_size)
    assert found.phase_peaks["loss"] > 4 * LABELLED * config.vocab_size


def test_the_first_step_is_simulated_with_its_own_examples(chat_recipe: Build) -> None:
    def simulated(*steps: tuple[Size, ...]) -> Simulation:
        *first, sizes = steps
        return simulate(chat_recipe("method.dropout=0.1"), LANGUAGE_HEAD, sizes=sizes, first=(first or [()])[0])

    light = fully_labelled((9, 5))
    both = simulated(light, SIZES)
    assert both.first_step_bytes == simulated(light).first_step_bytes < simulated(SIZES).first_step_bytes
    assert both.step_bytes == simulated(SIZES).step_bytes


def test_positions_without_loss_have_no_logits(chat_recipe: Build) -> None:
    half = tuple(Size(size.tokens, size.tokens // 2) for size in SIZES)
    all_of_them, half_of_them = (
        simulate(chat_recipe(), LANGUAGE_HEAD, sizes=sizes).flops["loss"] for sizes in (SIZES, half)
    )
    assert half_of_them / all_of_them == sum(size.labelled for size in half) / LABELLED


def test_scoring_is_a_phase_of_its_own(chat_recipe: Build) -> None:
    def simulated(*overrides: str) -> Simulation:
        return simulate(chat_recipe("backbone.dtype=float32", *overrides), LANGUAGE_HEAD, sizes=SIZES, device="cpu")

    never, few, many = (
        simulated(f"evaluation.{setting}") for setting in ("every=never", "batch_tokens=40", "batch_tokens=4000")
    )
    assert "evaluation" not in never.phase_peaks
    assert never.step_bytes == few.step_bytes == many.step_bytes == never.allocated_bytes
    # one and a hundred examples of 40 tokens, against three in a step
    assert many.phase == "evaluation"
    assert many.phase_peaks["evaluation"] > never.allocated_bytes > few.phase_peaks["evaluation"]
    rates = Rates(1e12, 1e11)
    assert step_seconds(never, rates, scale=1.0) == step_seconds(many, rates, scale=1.0)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_saving_is_a_phase_that_finds_weights_and_optimizer_state(chat_recipe: Build, method: str) -> None:
    recipe = chat_recipe("backbone.dtype=float32", "evaluation.every=never", method=method)
    found = simulate(recipe, LANGUAGE_HEAD, sizes=SIZES, device="cpu")
    held = sum(found.terms[term] for term in ("weights", "adapters", "optimizer state"))
    # virtual tokens go through their encoder on the way to the file: one more copy of them in float32
    made = found.terms["adapters"] if method == "prompt" else 0
    # but for a few numbers: the step's loss, the tokens' indices
    assert found.phase_peaks["save"] == pytest.approx(held + made, abs=1024)
    assert found.step_bytes == found.allocated_bytes


def test_activations_are_told_layer_by_layer(chat_recipe: Build) -> None:
    found = simulate(chat_recipe("evaluation.every=never"), LANGUAGE_HEAD, sizes=SIZES)
    assert list(found.layers) == [0, 1]
    for kind in ("attention", "feed-forward"):
        by_layer = [layer[kind] for layer in found.layers.values()]
        assert sum(by_layer) == found.terms[f"activations: {kind}"] > 0


def test_cached_layers_do_not_run(chat_recipe: Build) -> None:
    stream = step_stream(chat_recipe("method.layers=top-1", "training.activation_cache=true"))
    ran = {birth.module.partition(".layers.")[2][:1] for birth in stream.births if birth.phase == "forward"}
    assert ran == {"", "1"}


def test_a_cache_without_frozen_layers_is_refused_with_the_remedy(chat_recipe: Build) -> None:
    with pytest.raises(InputError, match=r"method\.layers=top-N"):
        simulate(chat_recipe("training.activation_cache=true"), LANGUAGE_HEAD, sizes=SIZES)


def test_offloaded_activations_leave_the_card(chat_recipe: Build) -> None:
    # of 10,000 tokens, a gate of 64 float16 features takes 1.2 MiB: large enough to be moved
    kept, offloaded = (
        simulate(
            chat_recipe("backbone.dtype=float16", *more), LANGUAGE_HEAD, sizes=fully_labelled((10_000,))
        ).phase_peaks["forward"]
        for more in ([], ["training.offload_activations=true"])
    )
    gates = 2 * 2 * 10_000 * 64 * 2  # gate and up of two layers
    assert offloaded < kept - gates


SCALES = 2 * 4 / 256
"""Bytes an element: two states, a float32 scale for 256 elements."""
TABLES = 2 * 256 * 4


@pytest.mark.parametrize(
    ("optimizer", "rank", "narrow", "wide", "tables"),
    [
        # B of keys and values is [16, rank]: below 4096 elements its states stay float32, below 100,000 on the card
        ("adamw-8bit", 128, 8, 2 + SCALES, TABLES),
        ("paged-adamw", 4096, 8, 0, 0),
        ("paged-adamw-8bit", 4096, 2 + SCALES, SCALES, TABLES),
    ],
)
def test_states_are_narrow_or_elsewhere(
    chat_recipe: Build, optimizer: str, rank: int, narrow: float, wide: float, tables: int
) -> None:
    recipe = chat_recipe(f"method.rank={rank}", f"training.optimizer={optimizer}")
    found = simulate(recipe, LANGUAGE_HEAD, sizes=SIZES)
    elements, few = found.terms["adapters"] // 4, 2 * 2 * 16 * rank
    assert found.terms["optimizer state"] == narrow * few + wide * (elements - few) + tables


def test_buckets_of_one_form_are_simulated_a_few_times_for_all(
    chat_recipe: Build, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = chat_recipe("backbone.dtype=bfloat16", "method.weights=kahan", method="full")
    config = AutoConfig.from_pretrained(tiny_llama)
    config.hidden_size = 128  # the embedding alone makes six buckets of a million elements

    few = simulate(recipe, LANGUAGE_HEAD, sizes=SIZES, config=config)
    monkeypatch.setattr(on_card, "_few_buckets", lambda cut, tracker, pieces: cut(pieces))
    every = simulate(recipe, LANGUAGE_HEAD, sizes=SIZES, config=config)
    assert len(few.work) < len(every.work)
    assert (few.allocated_bytes, few.reserved_bytes) == (every.allocated_bytes, every.reserved_bytes)
    assert (few.flops, few.moved_bytes) == (every.flops, every.moved_bytes)


def step_stream(recipe: Recipe, card: Architecture | None = CARD) -> Stream:
    """Everything that happens in a simulated step."""
    depth, trace = open_trace(
        recipe, LANGUAGE_HEAD, steps=(SIZES, SIZES), card=card, config=AutoConfig.from_pretrained(recipe.backbone.name)
    )
    return trace(depth.stretches)


def test_int8_is_refused_with_the_remedy(chat_recipe: Build) -> None:
    with pytest.raises(InputError, match="nf4"):
        simulate(chat_recipe("backbone.quantization=int8"), LANGUAGE_HEAD, sizes=SIZES)


def test_a_step_takes_its_usual_way_where_numbers_are_unknown(chat_recipe: Build) -> None:
    # VB-LoRA stops at a logit that is no number, LoHa leaves a layer out by a number that it draws
    for options in ({"type": "VBLORA", "vector_length": 8, "num_vectors": 16}, {"type": "LOHA"}):
        method = {"kind": "peft", "target_modules": ["q_proj"], **options}
        assert simulate(chat_recipe(method=method), LANGUAGE_HEAD, sizes=SIZES).terms["adapters"] > 0


def test_sizes_that_depend_on_numbers_are_one_message(chat_recipe: Build) -> None:
    method = {"kind": "peft", "type": "SHIRA", "r": 2, "target_modules": ["q_proj"]}
    with pytest.raises(InputError, match="--no-plan"):
        simulate(chat_recipe(method=method), LANGUAGE_HEAD, sizes=SIZES)


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


def test_another_trainers_optimizer_counts(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)

    def state(optimizer: Any) -> int:
        settings = PeerSettings(batch=2, lengths=(40, 40), precision="bf16", optimizer=optimizer)
        return simulate_peer(settings, config).terms.get("optimizer state", 0)

    weights = params_of(config)
    # two moments in the weights' dtype; two of a byte each, and a scale for 256 of them
    assert state("adamw") == pytest.approx(2 * 2 * weights, rel=0.01)
    assert state("adamw-8bit") == pytest.approx((2 + 2 * 4 / 256) * weights, rel=0.05)
    assert state("sgd") == 0


def test_packed_layers_take_the_place_of_gpt2s_transposed_ones() -> None:
    from peft import LoraConfig
    from transformers import GPT2Config

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128)
    adapter = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    settings = PeerSettings(batch=1, lengths=(16, 16), adapter=adapter, precision="fp16", quantization="nf4")
    found = simulate_peer(settings, config)
    # of each layer 3 + 1 + 4 + 4 times hidden x hidden weights, at half a byte
    assert found.terms["weights, quantized"] == 2 * 12 * 64 * 64 // 2


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
