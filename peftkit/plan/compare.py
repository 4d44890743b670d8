"""Which methods, and which sizes of backbone, a card has room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.backbones.configs import bundled_names
from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.errors import InputError
from peftkit.plan.cards import Card
from peftkit.plan.planner import Plan, Planner
from peftkit.plan.search import find_fit
from peftkit.plan.workload import Workload
from peftkit.recipe import Recipe, build_recipe

METHODS = ("full", "lora", "qlora", "prefix", "prompt")
SIZED_METHODS = ("full", "lora", "qlora")
"""Those that a table of backbones has columns for: the others take about what LoRA takes."""


@dataclass(frozen=True, slots=True)
class MethodLine:
    """One method on a recipe's backbone and data.

    Attributes:
        plan: with forwards of one example and nothing recomputed; None where the method cannot work.
        largest_batch: examples of a forward that fit; 0 when not even one does.
        trouble: why it cannot work.
    """

    method: str
    plan: Plan | None
    largest_batch: int
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class ModelLine:
    """One backbone on a card: by method, the plan that fits or else the smallest that was found."""

    backbone: str
    total_params: int
    plans: dict[str, Plan]


def compare_methods(recipe: Recipe, planner: Planner, workload: Workload) -> Iterator[MethodLine]:
    """A line for each method, everything else as in the recipe."""
    for method in METHODS:
        try:
            yield _line(method, _variant(recipe, method), planner, workload)
        except InputError as fault:
            yield MethodLine(method, None, 0, str(fault))


def fitting_models(recipe: Recipe, card: Card, backbones: Sequence[str] = ()) -> Iterator[ModelLine]:
    """A line for each backbone whose configuration ships with peftkit, by its size; lengths as in the recipe."""
    sized = []
    for name in backbones or bundled_names():
        variant = build_recipe({**recipe.to_dict(), "backbone": {"name": name}})
        sized.append((Planner.open(variant, LANGUAGE_HEAD, card), variant))
    for planner, variant in sorted(sized, key=lambda pair: pair[0].dims.num_params):
        plans: dict[str, Plan] = {}
        for method in SIZED_METHODS:
            found = find_fit(build_recipe(_variant(variant, method)), planner, only_cuts=True)
            best = found.chosen or min(found.options, key=lambda option: option.plan.needed_bytes)
            plans[method] = best.plan
        yield ModelLine(variant.backbone.name, planner.dims.num_params, plans)


def _variant(recipe: Recipe, method: str) -> dict[str, Any]:
    """The recipe's plain data with another method, nothing recomputed; its own method keeps its settings."""
    content = recipe.to_dict()
    kind, quantization = ("lora", "nf4") if method == "qlora" else (method, "none")
    content["method"] = content["method"] if recipe.method.kind == kind else {"kind": kind}
    content["backbone"] = {**content["backbone"], "quantization": quantization}
    content["training"] = {**content["training"], "checkpointing": "off"}
    return content


def _line(method: str, content: dict[str, Any], planner: Planner, workload: Workload) -> MethodLine:
    """The method with one example a forward, and how many more fit: each takes what the second takes."""
    one = planner.plan(build_recipe(content, ["training.micro_batch=1"]), workload)
    two = planner.plan(build_recipe(content, ["training.micro_batch=2"]), workload)
    room = planner.card.memory_bytes - one.needed_bytes
    if room < 0:
        return MethodLine(method, one, 0)
    each = max(1, two.needed_bytes - one.needed_bytes)
    return MethodLine(method, one, min(1 + room // each, int(content["training"]["batch_size"])))
