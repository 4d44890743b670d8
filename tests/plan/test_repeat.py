"""A deep model's stream written from shallow ones: the same as simulating every layer, event by event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma3TextConfig

from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.plan import peer
from peftkit.plan.align import Irregular
from peftkit.plan.allocator import Event
from peftkit.plan.cuda_operators import Architecture
from peftkit.plan.depth import Depth, Trace, singles_out, trace_deep
from peftkit.plan.peer import PeerSettings, simulate_peer
from peftkit.plan.repeat import Deeper, repeat
from peftkit.plan.simulate import open_trace
from peftkit.plan.sizes import fully_labelled
from peftkit.plan.storages import Birth, Stream
from peftkit.recipe import Recipe

SIZES = fully_labelled((40, 33, 12))
CARD = Architecture((8, 9))
THREE = Head("classification", ("a", "b", "c"), "single_label_classification")
Build = Callable[..., Recipe]


def deep(folder: Path, layers: int) -> Any:
    """The configuration in a folder with another number of layers."""
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    return config


def repeats(recipe: Recipe, config: Any, *, head: Head = LANGUAGE_HEAD, card: Architecture | None = CARD) -> list[Any]:
    """The stretches that are simulated when the stream is asked for, once it is shown to be that of all layers."""
    depth, trace = open_trace(recipe, head, steps=(SIZES, SIZES), card=card, config=config)
    simulated: list[Any] = []

    def noting(stretches: Sequence[int]) -> Stream:
        simulated.append(stretches)
        return trace(stretches)

    found = trace_deep(depth, noting)
    assert found == trace(depth.stretches)
    return simulated


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora"],
        ["method=lora", "method.dropout=0.1", "training.optimizer=adamw-8bit"],
        ["method=lora", "training.checkpointing=all"],
        ["method=lora", "training.kernels.packing=false", "training.kernels.loss=false", "training.kernels.lora=false"],
        ["method=lora", "training.optimizer_in_backward=true", "training.clip=null"],
        ["method=lora", "training.offload_activations=true"],
        ["method=full", "backbone.dtype=bfloat16", "training.checkpointing=all"],
        ["method=full", "training.optimizer_in_backward=true", "training.clip=null"],
        ["method=qlora"],
        ["method=prefix", "training.kernels.packing=false"],
        ["method=prompt"],
    ],
    ids=" ".join,
)
def test_nine_layers_are_told_by_six(chat_recipe: Build, tiny_llama: Path, overrides: list[str]) -> None:
    # two layers, and two more that show what one more adds
    assert repeats(chat_recipe(*overrides), deep(tiny_llama, 9)) == [(4,), (2,)]


def test_an_encoder_on_the_host_repeats_too(classify_recipe: Build, tiny_bert: Path) -> None:
    recipe = classify_recipe("training.dropout=0", method="lora")
    assert repeats(recipe, deep(tiny_bert, 9), head=THREE, card=None) == [(4,), (2,)]


@pytest.mark.parametrize(
    ("layers", "overrides", "simulated"),
    [
        # each stretch is grown by itself; three layers that train are few enough to stay
        (17, ["method=prompt", "training.checkpointing=9"], [(4, 2), (2, 4), (2, 2)]),
        (17, ["method=lora", "training.checkpointing=9"], [(4, 2), (2, 4), (2, 2)]),
        (17, ["method=full", "training.checkpointing=8"], [(4, 2), (2, 4), (2, 2)]),
        (13, ["method=lora", "method.layers=top-3"], [(4, 3), (2, 3)]),
    ],
)
def test_layers_that_are_treated_alike_are_a_stretch(
    chat_recipe: Build, tiny_llama: Path, layers: int, overrides: list[str], simulated: list[Any]
) -> None:
    assert repeats(chat_recipe(*overrides), deep(tiny_llama, layers)) == simulated


def test_layers_repeat_by_the_pattern_of_their_kinds(chat_recipe: Build) -> None:
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=11,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=[*["sliding_attention", "full_attention"] * 5, "sliding_attention"],
    )
    # five times two layers, and one: simulated once and three times, with the one on top
    assert repeats(chat_recipe(), config) == [(3,), (1,)]


def test_layers_without_a_pattern_are_all_simulated(chat_recipe: Build, tiny_llama: Path) -> None:
    assert repeats(chat_recipe(), deep(tiny_llama, 3)) == [(3,)]
    assert repeats(chat_recipe("method.layers=[1,7]"), deep(tiny_llama, 9)) == [(1,)]
    named = chat_recipe(r"method.targets=['model\.layers\.[1-3]\.mlp\.up_proj']")
    assert repeats(named, deep(tiny_llama, 9)) == [(1,)]


def test_an_optimizer_that_mixes_layers_is_simulated_whole(chat_recipe: Build, tiny_llama: Path) -> None:
    recipe = chat_recipe("backbone.dtype=bfloat16", "method.weights=kahan", method="full")
    assert repeats(recipe, deep(tiny_llama, 9))[-1] == (9,)


def test_another_trainers_steps_repeat(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = PeerSettings(batch=2, lengths=(30, 40), adapter=adapter, padded=True, clip=True, empties_cache=True)
    repeated = simulate_peer(settings, deep(tiny_llama, 9))

    def whole(depth: Depth, trace: Trace) -> Stream:
        return trace(depth.stretches)

    monkeypatch.setattr(peer, "trace_deep", whole)
    assert repeated == simulate_peer(settings, deep(tiny_llama, 9))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 16, "targets": ["q_proj", "fc1"], "type": "C3A"}, False),
        ({"targets": ["layers.3.mlp.up_proj"]}, True),
        ({"targets": [r"layers\.\d\.mlp"]}, True),
        ({"layers_to_transform": [0, 1]}, True),
        ({"num_layers": 2}, True),
        ({"rank_pattern": {"layers.1": 4}}, True),
    ],
)
def test_settings_that_name_layers_are_found(settings: dict[str, Any], expected: bool) -> None:
    assert singles_out(settings) is expected


def toy(layers: int) -> Stream:
    """Weights, a forward pass whose activations die in reverse order, and a buffer whose size depends on the depth."""
    stream = Stream()

    def born(num_bytes: int, phase: str, module: str = "") -> int:
        stream.events.append(Event(len(stream.births), num_bytes))
        stream.births.append(Birth(num_bytes, phase, module, "made", 1))
        return len(stream.births) - 1

    stream.phases.append((0, "load*"))
    for layer in range(layers):
        born(100, "load*", f"layers.{layer}")
    stream.phases.append((len(stream.events), "forward"))
    kept = []
    for layer in range(layers):
        passing = born(7, "forward", f"layers.{layer}")
        kept.append(born(20, "forward", f"layers.{layer}"))
        stream.add_work(10, 27)
        stream.events.append(Event(passing, 0))
    stream.phases.append((len(stream.events), "backward"))
    norm = born(4 * layers, "backward")
    for activation in reversed(kept):
        gradient = born(30, "backward")
        stream.events.append(Event(activation, 0))
        stream.add_work(20, 50)
        stream.events.append(Event(gradient, 0))
    stream.add_work(0, 4 * layers)
    stream.events.append(Event(norm, 0))
    return stream


def test_blocks_are_inserted_where_a_deeper_stream_has_more() -> None:
    assert repeat(toy(2), [Deeper(toy(4), 7)]) == toy(9)
    assert repeat(toy(3), [Deeper(toy(5), 1)]) == toy(4)


def test_a_stream_that_does_not_repeat_is_refused() -> None:
    other = toy(4)
    # one activation of the deeper model is another size
    index = next(i for i, event in enumerate(other.events) if event.num_bytes == 20)
    other.events[index] = Event(other.events[index].tensor, 21)
    other.births[other.events[index].tensor].num_bytes = 21
    with pytest.raises(Irregular):
        repeat(toy(2), [Deeper(other, 7)])
