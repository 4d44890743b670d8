"""The command line of adapters: flags of combine, inspect, diff and resize, and what each of them answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

Say = Callable[[str], None]
Answer = tuple[dict[str, Any], "RenderableType"]
"""The same as a JSON document and as a terminal shows it."""


def add_flags(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the four verbs to a parser; `verb` makes one of a name and a summary."""
    combine = verb("combine", "make one adapter of many, and score it beside its parts")
    combine.add_argument("adapters", type=Path, nargs="+", metavar="RUN_OR_ADAPTER")
    combine.add_argument("--out", type=Path, required=True)
    hows = ("linear", "svd", "ties", "dare", "dare-ties", "magnitude", "cat")
    combine.add_argument("--how", choices=hows, default="linear", help="default: linear, the exact weighted sum")
    weights = "one a part, such as --weights=0.7,-0.3; default: equal, adding up to 1 (ties, dare-ties: 1 each)"
    combine.add_argument("--weights", type=_numbers, metavar="W,W,...", help=weights)
    combine.add_argument("--density", type=float, help="share of entries that pruning keeps; default 0.5")
    combine.add_argument("--rank", type=int, help="of the result; default: what holds the sum, or the largest part's")
    combine.add_argument("--seed", type=int, help="of dare's draws and of the search; default 0")
    space = "deltas: what is added to the weights; factors: A and B apart, as PEFT combines adapters of one rank"
    combine.add_argument("--space", choices=("deltas", "factors"), default="deltas", help=space)
    combine.add_argument("--head", metavar="PART", help="whose head, where they differ: 1, 2, ..., a path, or mean")
    combine.add_argument("--base", help="the base, where the adapters don't know it or it has moved")
    scored = combine.add_mutually_exclusive_group()
    scored.add_argument(
        "--on", type=Path, action="append", metavar="RECIPE", help="score on it; default: the runs' own"
    )
    scored.add_argument("--no-score", action="store_true", help="load no base and score nothing")
    combine.add_argument("--search", action="store_true", help="find the weights on the validation splits")
    combine.add_argument("--trials", type=int, help="weights that the search tries; default 30")
    inspect = verb("inspect", "what an adapter is: method, ranks, norms, base, training")
    inspect.add_argument("adapter", type=Path, metavar="RUN_OR_ADAPTER")
    diff = verb("diff", "how two adapters differ: settings, and the delta of each module")
    diff.add_argument("one", type=Path, metavar="A")
    diff.add_argument("other", type=Path, metavar="B")
    resize = verb("resize", "give a LoRA another rank, and measure what that loses")
    resize.add_argument("adapter", type=Path, metavar="RUN_OR_ADAPTER")
    resize.add_argument("--rank", type=int, required=True)
    resize.add_argument("--out", type=Path, required=True)
    resize.add_argument("--on", type=Path, action="append", metavar="RECIPE", help="score before and after on it")
    resize.add_argument("--base", help="the base to score with, where it has moved")


def answer_combine(options: argparse.Namespace, say: Say) -> Answer:
    """Combine, and show parts, losses and scores."""
    from peftkit.deploy.care_tables import render_combined
    from peftkit.deploy.combine import TRIALS, combine
    from peftkit.deploy.mixing import Mix
    from peftkit.errors import InputError
    from peftkit.recipe import load_recipe

    if options.trials is not None and not options.search:
        raise InputError("--trials would be ignored without --search.")
    if options.search and options.no_score:
        raise InputError("--search scores every trial: leave --no-score out.")
    report = combine(
        options.adapters,
        options.out,
        Mix(options.how, options.weights, options.space, options.density, options.rank, options.seed),
        head=options.head,
        on=[] if options.no_score else [load_recipe(path) for path in options.on] if options.on else None,
        trials=(TRIALS if options.trials is None else options.trials) if options.search else None,
        base=options.base,
        say=say,
    )
    return report.model_dump(mode="json", exclude_none=True), render_combined(report, str(options.out))


def answer_inspect(options: argparse.Namespace, say: Say) -> Answer:
    """Inspect one adapter."""
    from peftkit.deploy.care import inspect
    from peftkit.deploy.care_tables import render_inspection

    found = inspect(options.adapter)
    return found.model_dump(mode="json", exclude_none=True), render_inspection(found)


def answer_diff(options: argparse.Namespace, say: Say) -> Answer:
    """Compare two adapters."""
    from peftkit.deploy.care import diff
    from peftkit.deploy.care_tables import render_difference

    found = diff(options.one, options.other)
    return found.model_dump(mode="json"), render_difference(found)


def answer_resize(options: argparse.Namespace, say: Say) -> Answer:
    """Resize one adapter."""
    from peftkit.deploy.care_tables import render_resized
    from peftkit.deploy.resize import resize
    from peftkit.recipe import load_recipe

    recipes = [load_recipe(path) for path in options.on or ()]
    report = resize(options.adapter, options.out, rank=options.rank, on=recipes, base=options.base, say=say)
    return report.model_dump(mode="json", exclude_none=True), render_resized(report, str(options.out))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.7,0.3") from None


ANSWERS: dict[str, Callable[[argparse.Namespace, Say], Answer]] = {
    "combine": answer_combine,
    "inspect": answer_inspect,
    "diff": answer_diff,
    "resize": answer_resize,
}
