"""What `peftkit plan` answers: one function for each question, each with its document and its rendering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import DoesNotFit, InputError, MethodError
from peftkit.plan.at_hand import AtHand, look
from peftkit.plan.cards import Card, parse_gpu, this_machine
from peftkit.plan.compare import MethodLine, ModelLine, compare_methods, fitting_models
from peftkit.plan.planner import Plan, Planner
from peftkit.plan.search import Option, find_fit
from peftkit.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in three forms.

    Attributes:
        fits: whether anything of it fits the card.
        document: plain data, for `--json`.
        shown: for a terminal.
        plan: the recipe's own, where one was made.
    """

    fits: bool
    document: dict[str, Any]
    shown: RenderableType
    plan: Plan | None = None


def open_planner(recipe: Recipe, gpu: str | None) -> tuple[Planner, AtHand]:
    """A planner for the recipe's backbone on the named card, or on this machine.

    Raises:
        InputError: an unknown card, a configuration that cannot be had, faulty data, or a method that trains nothing.
    """
    if recipe.method.shots is not None:
        raise MethodError(f"method {recipe.method.kind!r} trains nothing, so there is no training step to plan.")
    card = this_machine() if gpu is None else parse_gpu(gpu)
    hand = look(recipe)
    return Planner.open(recipe, hand.head, card), hand


def plan_recipe(recipe: Recipe, *, gpu: str | None = None) -> Plan:
    """What a run of the recipe needs, on the named card or size of memory, or on this machine.

    Raises:
        InputError: see `open_planner`.
    """
    planner, hand = open_planner(recipe, gpu)
    return planner.plan(recipe, hand.workload(recipe, planner.dims))


def answer_plan(recipe: Recipe, gpu: str | None) -> Answer:
    """Does it fit, and why not?"""
    from peftkit.plan.render import render_plan

    plan = plan_recipe(recipe, gpu=gpu)
    return Answer(plan.fits, plan.document(), render_plan(plan), plan)


def answer_peer(recipe: Recipe, gpu: str | None) -> Answer:
    """Would it fit in a plain transformers and PEFT trainer?"""
    from peftkit.plan.render import render_plan

    planner, hand = open_planner(recipe, gpu)
    plan = planner.plan_peer(recipe, hand.workload(recipe, planner.dims))
    return Answer(plan.fits, plan.document() | {"as": "peer"}, render_plan(plan), plan)


def answer_fit(recipe: Recipe, gpu: str | None) -> Answer:
    """What to change so that it fits, or is faster."""
    from peftkit.plan.render import render_found

    planner, hand = open_planner(recipe, gpu)
    found = find_fit(recipe, planner, hand.workload(recipe, planner.dims))
    document = found.options[0].plan.document() | {"options": [_option(option) for option in found.options]}
    if found.chosen is not None:
        document["chosen"] = _option(found.chosen)
    plan = found.options[0].plan if found.chosen is None else found.chosen.plan
    return Answer(found.chosen is not None, document, render_found(found), plan)


def fitted(recipe: Recipe, *, say: Callable[[str], None]) -> Recipe:
    """The recipe with the changes that `--fit` finds for this machine.

    Raises:
        DoesNotFit: nothing that the search may change makes it fit.
    """
    planner, hand = open_planner(recipe, None)
    found = find_fit(recipe, planner, hand.workload(recipe, planner.dims))
    if found.chosen is None:
        least = min(found.options, key=lambda option: option.plan.needed_bytes).plan
        raise DoesNotFit(f"{least.trouble} even with {'; '.join(found.options[-1].changes)}. Take a smaller backbone.")
    if found.chosen.changes:
        say(f"--fit changes {', '.join(found.chosen.changes)} and gives up {found.chosen.gives_up}")
    return found.chosen.plan.recipe


def answer_methods(recipe: Recipe, gpu: str | None) -> Answer:
    """Which methods does the card have room for?"""
    from peftkit.plan.render import render_methods

    planner, hand = open_planner(recipe, gpu)
    lines = list(compare_methods(recipe, planner, hand.workload(recipe, planner.dims)))
    fits = any(line.plan is not None and line.plan.fits for line in lines)
    document = {"methods": [_method(line) for line in lines]}
    return Answer(fits, document, render_methods(lines, card=_named(planner.card)))


def answer_models(recipe: Recipe, gpu: str | None) -> Answer:
    """Which sizes of backbone does the card have room for?"""
    from peftkit.plan.render import render_models

    card = this_machine() if gpu is None else parse_gpu(gpu)
    lines = list(fitting_models(recipe, card))
    fits = any(plan.fits for line in lines for plan in line.plans.values())
    return Answer(fits, {"models": [_model(line) for line in lines]}, render_models(lines, card=_named(card)))


QUESTIONS = {
    "plan": answer_plan,
    "peer": answer_peer,
    "fit": answer_fit,
    "compare": answer_methods,
    "models": answer_models,
}
"""What a person may ask, by its flag."""


def _named(card: Card) -> str:
    from peftkit.units import format_bytes

    return f"{card.name} ({format_bytes(card.memory_bytes)})"


def _option(option: Option) -> dict[str, Any]:
    return {
        "changes": list(option.changes),
        "gives_up": option.gives_up,
        "fits": option.plan.fits,
        "needed_bytes": option.plan.needed_bytes,
        "time_ratio": option.time_ratio,
    }


def _method(line: MethodLine) -> dict[str, Any]:
    if line.plan is None:
        return {"method": line.method, "trouble": line.trouble}
    return {"method": line.method, "largest_forward": line.largest_batch, "plan": line.plan.document()}


def _model(line: ModelLine) -> dict[str, Any]:
    plans = {
        method: {"fits": plan.fits, "needed_bytes": plan.needed_bytes, "training": _cut(plan)}
        for method, plan in line.plans.items()
    }
    return {"backbone": line.backbone, "parameters": line.total_params, "plans": plans}


def _cut(plan: Plan) -> dict[str, Any]:
    training = plan.recipe.training
    return {"micro_batch": training.micro_batch, "checkpointing": training.checkpointing}


def draw(answer: Answer, path: Path) -> None:
    """Write the memory of the answer's step as a PNG.

    Raises:
        InputError: the answer is a table of many plans.
        OutputError: the path cannot be written.
    """
    from peftkit.plan.timeline import draw_timeline

    if answer.plan is None:
        raise InputError("--plot draws one plan: leave --compare and --models out.")
    draw_timeline(answer.plan, path)
