"""Plans as people read them on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from peftkit.plan.compare import SIZED_METHODS, MethodLine, ModelLine
from peftkit.plan.planner import Plan
from peftkit.plan.search import Found, Option
from peftkit.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_plan(plan: Plan) -> RenderableType:
    """The terms at the peak, largest first, and the verdict."""
    found = plan.simulation
    table = Table(box=None, pad_edge=False)
    table.add_column(f"at the peak, in the {found.phase}")
    table.add_column("", justify="right")
    for term, num_bytes in sorted(found.terms.items(), key=lambda item: -item[1]):
        if num_bytes:
            table.add_row(term, format_bytes(num_bytes))
    table.add_row("margin", f"{format_bytes(plan.needed_bytes - found.total_bytes)}", style="dim")
    table.add_section()
    table.add_row("needed", format_bytes(plan.needed_bytes), style="bold")
    return Group(_heading(plan), "", table, "", _verdict(plan), *_time(plan))


def render_found(found: Found) -> RenderableType:
    """Every option that was tried, in the order of giving up, and the one to take."""
    table = Table(box=None, pad_edge=False)
    for column in ("change", "needs", "", "time", "gives up"):
        table.add_column(column, justify="right" if column in ("needs", "time") else "left")
    for option in found.options:
        chosen = option is found.chosen
        table.add_row(
            _changes(option),
            format_bytes(option.plan.needed_bytes),
            "fits" if option.plan.fits else "too large",
            f"x{option.time_ratio:.2f}",
            option.gives_up,
            style="bold" if chosen else "" if option.plan.fits else "dim",
        )
    return Group(table, "", Text(_advice(found), style="bold"))


def render_methods(lines: Sequence[MethodLine], *, card: str) -> RenderableType:
    """One line a method."""
    table = Table(box=None, pad_edge=False, title=f"On {card}, forwards of one example, nothing recomputed")
    table.add_column("method")
    for column in ("trainable", "needs", "", "largest forward", "a step", "the run"):
        table.add_column(column, justify="right")
    for line in lines:
        plan = line.plan
        if plan is None:
            table.add_row(line.method, Text(line.trouble, style="dim"))
            continue
        table.add_row(
            line.method,
            format_count(plan.trainable_params),
            format_bytes(plan.needed_bytes),
            "fits" if plan.fits else "too large",
            f"{line.largest_batch} examples" if line.largest_batch else "-",
            "?" if plan.step_seconds is None else format_seconds(plan.step_seconds),
            "?" if plan.seconds is None else format_seconds(plan.seconds),
            style="" if plan.fits else "dim",
        )
    return table


def render_models(lines: Sequence[ModelLine], *, card: str) -> RenderableType:
    """One line a backbone: what each method needs when its forwards are cut to fit."""
    table = Table(box=None, pad_edge=False, title=f"On {card}")
    table.add_column("backbone")
    table.add_column("parameters", justify="right")
    for method in SIZED_METHODS:
        table.add_column(method, justify="right")
    for line in lines:
        cells = [
            Text(format_bytes(line.plans[method].needed_bytes), style="green" if line.plans[method].fits else "dim red")
            for method in SIZED_METHODS
        ]
        marks = [
            Text("✓ " if line.plans[method].fits else "✗ ") + cell
            for method, cell in zip(SIZED_METHODS, cells, strict=True)
        ]
        table.add_row(line.backbone, format_count(line.total_params), *marks)
    return table


def _heading(plan: Plan) -> str:
    training, lengths = plan.recipe.training, plan.workload
    known = "counted in the data" if lengths.source == "data" else "the recipe's maximum"
    return (
        f"{plan.recipe.label} of {plan.recipe.backbone.name}: {format_count(plan.trainable_params)} of "
        f"{format_count(plan.total_params)} parameters train\n"
        f"steps of {training.batch_size} examples, the longest {max(lengths.longest).tokens} tokens ({known})"
    )


def _verdict(plan: Plan) -> Text:
    card = f"{plan.card.name} ({format_bytes(plan.card.memory_bytes)})"
    if plan.fits:
        spare = format_bytes(plan.card.memory_bytes - plan.needed_bytes)
        return Text(f"fits {card} with {spare} to spare", style="bold green")
    missing = format_bytes(plan.needed_bytes - plan.card.memory_bytes)
    return Text(f"does not fit {card}: {missing} too much. `--fit` says what to change", style="bold red")


def _time(plan: Plan) -> list[str]:
    if plan.step_seconds is None:
        return ["time unknown: name the card instead of its size"]
    at_most = "" if plan.workload.source == "data" else "at most "
    text = f"{at_most}{format_seconds(plan.step_seconds)} a step"
    if plan.seconds is not None:
        steps = "all" if plan.num_steps is None else f"{plan.num_steps:,}"
        text += f", {at_most}{format_seconds(plan.seconds)} for {steps} steps"
    return [text]


def _changes(option: Option) -> str:
    return "\n".join(option.changes) or "as written"


def _advice(found: Found) -> str:
    chosen = found.chosen
    if chosen is None:
        return "nothing that this search may change makes it fit: take a smaller backbone, or another method"
    if not chosen.changes:
        return "take it as written: it fits, and nothing tried is faster"
    overrides = " ".join(f"'{change}'" if " " in change else change for change in chosen.changes)
    return f"take: {overrides}"
