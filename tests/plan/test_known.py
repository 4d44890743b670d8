"""Simulations share what they have in common, and come out the same."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.plan.known import MOST, Streams
from peftkit.plan.simulation import Simulation
from peftkit.plan.sizes import fully_labelled
from peftkit.plan.storages import Stream
from peftkit.recipe import Recipe

SIZES = fully_labelled((40, 33, 12))


def test_recipes_are_simulated_once_where_short_models_do_not_tell_them_apart(
    chat_recipe: Callable[..., Recipe], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("peftkit.plan.simulate")
    own, traced = module._trace, list[int]()

    def counting(recipe: Recipe, head: Any, config: Any, *others: Any, **more: Any) -> Stream:
        traced.append(config.num_hidden_layers)
        stream: Stream = own(recipe, head, config, *others, **more)
        return stream

    monkeypatch.setattr(module, "_trace", counting)
    config, known = AutoConfig.from_pretrained(tiny_llama), Streams()
    config.num_hidden_layers = 20

    def simulated(*overrides: str, known: Streams | None = known) -> Simulation:
        recipe = chat_recipe("evaluation.every=never", *overrides, method="prompt")
        found: Simulation = module.simulate(recipe, LANGUAGE_HEAD, sizes=SIZES, config=config, known=known)
        return found

    whole = simulated("training.micro_batch=auto")
    assert traced == [4, 2]
    # all three examples in one forward, in other words
    assert simulated("training.micro_batch=3") == whole
    assert traced == [4, 2]
    assert simulated("training.micro_batch=1").allocated_bytes < whole.allocated_bytes
    assert traced == [4, 2] * 2
    # two recomputed layers below two others, and each stretch with two more
    eight = simulated("training.checkpointing=8")
    assert traced == [4, 2] * 2 + [6, 6, 4]
    ten = simulated("training.checkpointing=10")
    assert traced == [4, 2] * 2 + [6, 6, 4]
    assert ten.allocated_bytes < eight.allocated_bytes
    assert ten == simulated("training.checkpointing=10", known=None)


def test_the_oldest_stream_makes_room() -> None:
    known, made = Streams(), list[str]()

    def get(key: str) -> None:
        def make() -> Stream:
            made.append(key)
            return Stream()

        known.get(key, make)

    for number in range(MOST + 1):
        get(str(number))
    get(str(MOST))
    get("1")
    assert made == [*map(str, range(MOST + 1))]
    get("0")
    assert made[-1] == "0"
