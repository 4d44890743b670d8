"""Streams that were simulated before: a search's options differ in much that a model of a few layers does not see."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peftkit.backbones.spec import Head
from peftkit.plan.cuda_operators import Architecture
from peftkit.plan.sizes import Size
from peftkit.plan.storages import Stream
from peftkit.plan.workload import cut_step
from peftkit.recipe import Recipe

MOST = 24
"""Streams that are kept: a few MB each."""


@dataclass(slots=True)
class Streams:
    """The streams of short models, by all that they depend on; the oldest makes room."""

    _kept: dict[str, Stream] = field(default_factory=dict)

    def get(self, key: str, make: Callable[[], Stream]) -> Stream:
        """The stream of this key, made where it is not known."""
        if key not in self._kept:
            made = make()
            while len(self._kept) >= MOST:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = made
        return self._kept[key]


def key_of(
    recipe: Recipe, head: Head, config: Any, *, steps: Sequence[Sequence[Size]], card: Architecture | None
) -> str:
    """All that a recipe's stream depends on: not where its data lie, nor in which words its steps are cut.

    Args:
        config: the backbone's transformers configuration.
    """
    settings = recipe.model_dump(include={"backbone", "method", "task", "training", "evaluation"})
    device: Literal["cuda", "cpu"] = "cpu" if card is None else "cuda"
    lengths = [[size.tokens for size in step] for step in steps]
    settings["training"]["micro_batch"] = [
        [[example.row for example in forward] for forward in cut_step(recipe, step, device=device)] for step in lengths
    ]
    return json.dumps([settings, config.to_dict(), repr((head, steps, card))], sort_keys=True, default=repr)
