"""The memory of a simulated step as a picture: what is allocated, by term, from its first event to its last."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.plan.planner import Plan
from peftkit.report.plots import COLOURS, DPI, GREY, save_figure
from peftkit.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 2.0
"""The card's limit is drawn when it is at most so many times the peak: else it would flatten everything below."""
OTHER = "smaller terms"


def draw_timeline(plan: Plan, path: Path) -> None:
    """Write a PNG of one optimizer step; time runs from allocation to allocation, not by the clock.

    Raises:
        OutputError: `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = plan.simulation
    moments = found.timeline
    unit, name = (GIB, "GiB") if found.allocated_bytes > GIB else (MIB, "MiB")
    figure = Figure(figsize=(10, 5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    terms = _largest_terms(plan)
    layers = [[moment.terms.get(term, 0) / unit for moment in moments] for term in terms]
    rest = [
        (sum(moment.terms.values()) - sum(moment.terms.get(term, 0) for term in terms)) / unit for moment in moments
    ]
    at = range(len(moments))
    axes.stackplot(at, *layers, rest, labels=[*terms, OTHER], colors=[*COLOURS[: len(terms)], "#BBBBBB"], step="post")
    _mark_phases(axes, plan)
    _mark_limit(axes, plan, unit)
    axes.set_ylabel(f"allocated, {name}")
    axes.set_xlabel("one optimizer step, from allocation to allocation")
    axes.set_xlim(0, max(1, len(moments) - 1))
    axes.set_xticks([])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.suptitle(
        f"{plan.recipe.label} of {plan.recipe.backbone.name}: {format_bytes(plan.needed_bytes)} needed, peak in the "
        f"{found.phase}",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, reverse=True)
    save_figure(figure, path)


def _largest_terms(plan: Plan) -> list[str]:
    """The terms that are ever large, those that stay before those that come and go; as many as there are colours."""
    moments = plan.simulation.timeline
    every = {term for moment in moments for term in moment.terms}
    most = {term: max(moment.terms.get(term, 0) for moment in moments) for term in every}
    least = {term: min(moment.terms.get(term, 0) for moment in moments) for term in every}
    kept = sorted(most, key=lambda term: -most[term])[: len(COLOURS)]
    return sorted(kept, key=lambda term: (-least[term], -most[term]))


def _mark_phases(axes: Axes, plan: Plan) -> None:
    """A line where a phase begins, and its name on top."""
    start = 0
    for phase, group in groupby(moment.phase for moment in plan.simulation.timeline):
        length = len(list(group))
        if start:
            axes.axvline(start, color=GREY, linewidth=0.6, linestyle=":")
        if length > len(plan.simulation.timeline) / 20:
            axes.annotate(
                phase,
                (start + length / 2, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8,
                color=GREY,
            )
        start += length


def _mark_limit(axes: Axes, plan: Plan, unit: int) -> None:
    """What the card leaves for allocations: its memory without the context."""
    room = plan.card.memory_bytes - plan.simulation.context_bytes
    if room <= NEAR * plan.simulation.allocated_bytes:
        axes.axhline(room / unit, color="#B00020", linewidth=1.2)
        axes.annotate(
            f"{plan.card.name}, without its context",
            (0, room / unit),
            textcoords="offset points",
            xytext=(4, 3),
            fontsize=8,
            color="#B00020",
        )
