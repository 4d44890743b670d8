"""A step's stream at full depth, from simulations of as few layers as show how it goes on."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from peftkit.plan.align import GROWTH, Irregular
from peftkit.plan.repeat import Deeper, repeat
from peftkit.plan.storages import Stream
from peftkit.recipe import Recipe
from peftkit.train.frozen_layers import repeated_blocks

SHORTEST = {1: (2, 4), 2: (1, 2)}
"""Repetitions that are simulated of a long stretch, at the first and the second attempt; by period, 2 for any above."""
SINGLED_OUT = re.compile(r"(?<!\w)\d|\\d")
"""A number in a name or pattern that may choose a layer: `layers.3.mlp` does, `fc1` does not."""

Trace = Callable[[Sequence[int]], Stream]
"""The stream with so many repetitions of each stretch."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How a model's layers repeat.

    Attributes:
        kinds: what each layer is; equal for layers that compute alike.
        stretches: repetitions in each stretch of layers that a step treats alike, from the lowest up.
        period: layers of a repetition; 1 where there are several stretches.
    """

    kinds: tuple[object, ...]
    stretches: tuple[int, ...]
    period: int = 1

    def num_layers(self, stretches: Sequence[int]) -> int:
        """Layers of a model with so many repetitions; the part of one at the top stays."""
        return len(self.kinds) - self.period * (sum(self.stretches) - sum(stretches))

    def layers_in(self, stretches: Sequence[int]) -> Sequence[int]:
        """Layers of each stretch, where there are so many repetitions."""
        return stretches if len(stretches) > 1 else [self.num_layers(stretches)]

    def is_shortened(self, skeleton: nn.Module, config: Any) -> bool:
        """Whether this is only the lower part of the model.

        Raises:
            Irregular: it is another model.
        """
        kinds = layer_kinds(skeleton, config)
        if kinds != self.kinds[: len(kinds)]:
            raise Irregular
        return len(kinds) < len(self.kinds)


def depth_of(skeleton: nn.Module, config: Any, cuts: Sequence[int] | None) -> Depth:
    """How the layers of a model on the meta device repeat.

    Args:
        cuts: layers from which on a step treats them in another way; None where that is not known.
    """
    kinds = layer_kinds(skeleton, config)
    whole = Depth(kinds, (1,), len(kinds))
    periods = (p for p in range(1, len(kinds) // 3 + 1) if kinds[p:] == kinds[:-p])
    period = next(periods, None)
    if period is None or cuts is None:
        return whole
    bounds = sorted({0, *(cut for cut in cuts if 0 < cut < len(kinds)), len(kinds)})
    if period == 1:
        return Depth(kinds, tuple(above - below for below, above in pairwise(bounds)))
    return whole if len(bounds) > 2 else Depth(kinds, (len(kinds) // period,), period)


def layer_kinds(skeleton: nn.Module, config: Any) -> tuple[object, ...]:
    """What each of a model's layers is: its modules, their settings, and its place in the configuration's lists."""
    blocks = list(repeated_blocks(skeleton) or ())
    lists = [values for values in layer_lists(config).values() if len(values) == len(blocks)]
    return tuple((_modules_of(block), repr([values[index] for values in lists])) for index, block in enumerate(blocks))


def layer_lists(config: Any) -> dict[str, list[Any]]:
    """The configuration's settings that have a value for each layer."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    return {key: value for key, value in text.to_dict().items() if isinstance(value, list) and len(value) == layers}


def shorten_config(config: Any, layers: int) -> Any:
    """The configuration of the lower part of a model."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    lists = layer_lists(config)
    text.num_hidden_layers = layers
    for key, values in lists.items():
        setattr(text, key, values[:layers])
    return short


def cuts_of(recipe: Recipe, layers: int) -> list[int] | None:
    """Layers from which on a step of the recipe treats them in another way; None where that cannot be told."""
    settings = recipe.method.model_dump()
    chosen, checkpointing = settings.pop("layers", "all"), recipe.training.checkpointing
    counted = chosen != "all", isinstance(checkpointing, int)
    if all(counted) or isinstance(chosen, list) or singles_out(settings):
        return None
    if isinstance(checkpointing, int):
        return [checkpointing]
    return [layers - int(chosen.removeprefix("top-"))] if chosen != "all" else []


def shorten_recipe(recipe: Recipe, layers: Sequence[int]) -> Recipe:
    """The recipe for a model with so many layers in each stretch between its cuts."""
    if isinstance(recipe.training.checkpointing, int):
        training = recipe.training.model_copy(update={"checkpointing": layers[0]})
        return recipe.model_copy(update={"training": training})
    if recipe.method.model_dump().get("layers", "all") == "all":
        return recipe
    method = recipe.method.model_copy(update={"layers": f"top-{layers[-1]}"})
    return recipe.model_copy(update={"method": method})


def singles_out(settings: Any, name: str = "") -> bool:
    """Whether a method's settings may name layers, which a shorter model would not have."""
    if isinstance(settings, dict):
        return any(singles_out(value, key) or singles_out(str(key)) for key, value in settings.items())
    if isinstance(settings, list | tuple | set):
        return any(singles_out(value, name) or isinstance(value, int) for value in settings)
    if isinstance(settings, str):
        return name not in ("kind", "type") and SINGLED_OUT.search(settings) is not None
    return isinstance(settings, int) and "layer" in name


def _modules_of(block: nn.Module) -> tuple[object, ...]:
    return tuple(
        (
            path,
            type(module),
            _settings_of(module),
            tuple((n, p.shape) for n, p in module.named_parameters(recurse=False)),
        )
        for path, module in block.named_modules()
    )


def _settings_of(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """A module's own numbers, words and switches, but for its index."""
    own = ((name, value) for name, value in vars(module).items() if type(value) in (int, float, bool, str))
    return tuple((name, value) for name, value in own if not name.endswith("idx"))


def trace_deep(depth: Depth, trace: Trace) -> Stream:
    """The stream at full depth; where it cannot be told from a few layers, all of them are simulated."""
    known: dict[tuple[int, ...], Stream] = {}

    def traced(stretches: tuple[int, ...]) -> Stream:
        if stretches not in known:
            known[stretches] = trace(stretches)
        return known[stretches]

    for shortest in SHORTEST[min(depth.period, 2)]:
        cut = [index for index, length in enumerate(depth.stretches) if length > shortest + GROWTH]
        short = tuple(shortest if index in cut else length for index, length in enumerate(depth.stretches))
        grown = [tuple(n + GROWTH * (i == index) for i, n in enumerate(short)) for index in cut]
        if not cut or sum(map(depth.num_layers, {short, *grown} - known.keys())) >= len(depth.kinds):
            break
        try:
            deeper = [
                Deeper(traced(longer), depth.stretches[i] - shortest) for i, longer in zip(cut, grown, strict=True)
            ]
            shallow = traced(short)
        except Irregular:
            break
        try:
            return repeat(shallow, deeper, period=depth.period)
        except Irregular:
            continue
    return trace(depth.stretches)
