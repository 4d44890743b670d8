"""Plots of a benchmark, as PNG."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.files import STAGING_PREFIX, explained
from peftkit.report.rows import CellRow, Estimate, Summary, common_metric, summarise
from peftkit.units import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A6D3B")
"""Okabe & Ito's colours, told apart by every kind of colour vision; yellow, too faint on white, is a brown here."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
GREY = "#6B6B6B"
PIXELS_WIDE, PIXELS_HIGH, DPI = 1600, 720, 160
CHANCE = "chance"
REACH = 0.75
"""A level is drawn when it lies within so many times the points' own spread from them."""
LEVEL_STYLE: dict[str, Any] = {"ha": "right", "fontsize": 8, "color": GREY}


@dataclass(frozen=True, slots=True)
class _Point:
    """One variant in one panel, in data units."""

    name: str
    x: float
    score: Estimate
    style: int


def scatter(rows: Sequence[CellRow], path: Path, *, title: str = "") -> bool:
    """Write quality against training memory (MiB) and against speed (tokens/s); False when there is nothing to draw.

    Variants that train nothing have neither and are drawn as lines. Bars are 95 % intervals. The horizontal axis is
    logarithmic where its values spread over more than a factor of ten.

    Raises:
        OutputError: `path` cannot be written.
    """
    summaries = [summary for summary in summarise(rows) if summary.score is not None]
    metric = common_metric(summaries)
    if metric is None or not any(map(_is_placed, summaries)):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PIXELS_WIDE / DPI, PIXELS_HIGH / DPI), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if title:
        figure.suptitle(_plain(title), fontsize=12, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(1, 2, sharey=True)
    far = _set_height(panels[0], summaries)
    panels[0].set_ylabel(f"{metric.replace('_', ' ')} (bars: 95 % intervals)", fontsize=9)
    drawn = []
    for axes, (label, measure) in zip(panels, MEASURES, strict=True):
        points = _points(summaries, measure)
        _panel(axes, points, label=label)
        drawn.append((axes, points, _draw_levels(axes, summaries, far)))
    canvas.draw()  # places are known in pixels from here on
    for axes, points, texts in drawn:
        _label_points(axes, points, texts)
    save_figure(figure, path)
    return True


def _memory_mib(summary: Summary) -> float | None:
    return None if summary.memory_bytes is None else summary.memory_bytes / MIB


MEASURES: tuple[tuple[str, Callable[[Summary], float | None]], ...] = (
    ("peak training memory over baseline (MiB) – less is better", _memory_mib),
    ("training speed (tokens/s) – more is better", lambda summary: summary.tokens_per_second),
)


def _points(summaries: Sequence[Summary], measure: Callable[[Summary], float | None]) -> list[_Point]:
    found = []
    for style, summary in enumerate(summaries):
        x = measure(summary)
        if x is not None and summary.score is not None:
            found.append(_Point(summary.variant, x, summary.score, style))
    return found


def _panel(axes: Axes, points: Sequence[_Point], *, label: str) -> None:
    """Markers with their intervals, on an axis that is logarithmic where the values spread widely."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for point in points:
        colour = COLOURS[point.style % len(COLOURS)]
        low, high = _bounds(point.score)
        axes.errorbar(
            point.x,
            point.score.value,
            yerr=[[max(0.0, point.score.value - low)], [max(0.0, high - point.score.value)]],
            color=colour,
            marker=MARKERS[point.style % len(MARKERS)],
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.4,
            alpha=0.95,
        )
    positive = [point.x for point in points if point.x > 0]
    if points and len(positive) == len(points) and max(positive) > 10 * min(positive):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.locator_params(axis="x", nbins=7)
    axes.xaxis.set_major_formatter(_plain_number)
    axes.margins(x=0.16)
    axes.set_xlabel(label, fontsize=9)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, color=GREY)


def _plain_number(value: float, position: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _bounds(score: Estimate) -> tuple[float, float]:
    low = score.value if score.low is None else score.low
    return low, score.value if score.high is None else score.high


def _levels(summaries: Sequence[Summary]) -> list[tuple[str, float]]:
    """What has a score but no place on a horizontal axis: chance, and the variants that train nothing."""
    levels = [(s.variant, s.score.value) for s in summaries if s.score is not None and not _is_placed(s)]
    chances = sorted({s.score.chance for s in summaries if s.score is not None and s.score.chance is not None})
    return levels + [(CHANCE, chance) for chance in chances[:1]]


def _is_placed(summary: Summary) -> bool:
    return summary.memory_bytes is not None or summary.tokens_per_second is not None


def _set_height(axes: Axes, summaries: Sequence[Summary]) -> list[tuple[str, float]]:
    """Fit the vertical axis to the points, and to the levels that are near them; those that are not, in order."""
    bounds = [bound for s in summaries if s.score is not None and _is_placed(s) for bound in _bounds(s.score)]
    low, high = min(bounds), max(bounds)
    reach = REACH * max(high - low, 0.02 * abs(high), 1e-6)
    near = [level for _, level in _levels(summaries) if low - reach <= level <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.12 * max(high - low, 0.02 * abs(high), 1e-6)
    axes.set_ylim(low - pad, high + pad)
    return [(name, level) for name, level in _levels(summaries) if level not in near]


def _draw_levels(axes: Axes, summaries: Sequence[Summary], far: Sequence[tuple[str, float]]) -> list[Text]:
    """Dashed lines with their names; levels outside of the axis are told in words at the edge they lie beyond."""
    texts: list[Text] = []
    edge = axes.get_yaxis_transform()
    near = [level for level in _levels(summaries) if level not in far]
    for i, (name, level) in enumerate(near):
        axes.axhline(level, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        side = "top" if name == CHANCE else "bottom"  # names of levels that lie close go side by side
        right = 0.99 if name == CHANCE else 0.99 - 0.3 * (i % 3)
        texts.append(axes.text(right, level, f"{_plain(name)} {level:.3f}", transform=edge, va=side, **LEVEL_STYLE))
    bottom, top = axes.get_ylim()
    for words, y, va, levels in (
        ("below", 0.01, "bottom", [x for x in far if x[1] < bottom]),
        ("above", 0.99, "top", [x for x in far if x[1] > top]),
    ):
        if levels:
            told = ", ".join(f"{_plain(name)} {level:.3f}" for name, level in levels)
            texts.append(
                axes.text(0.99, y, f"{words} this axis: {told}", transform=axes.transAxes, va=va, **LEVEL_STYLE)
            )
    return texts


def _label_points(axes: Axes, points: Sequence[_Point], avoid: Sequence[Text]) -> None:
    """Put each name beside its point, where it covers no other point, bar or name; a thin line where it is far."""
    from matplotlib.transforms import Bbox

    canvas: Any = axes.figure.canvas
    renderer = canvas.get_renderer()
    scale = DPI / 72
    frame = axes.get_window_extent(renderer)
    places = [tuple(axes.transData.transform((point.x, point.score.value))) for point in points]
    taken = [text.get_window_extent(renderer).padded(2) for text in avoid]
    for point, (x, y) in zip(points, places, strict=True):
        low, high = (axes.transData.transform((point.x, bound))[1] for bound in _bounds(point.score))
        taken += [
            Bbox.from_extents(x - 2 * scale, low, x + 2 * scale, high),
            Bbox.from_extents(x, y, x, y).padded(5 * scale),
        ]
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda item: -item[1][1]):
        colour = COLOURS[point.style % len(COLOURS)]
        text = axes.annotate(
            _plain(point.name),
            (point.x, point.score.value),
            (0, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=colour,
            ha="center",
            va="center",
        )
        size = text.get_window_extent(renderer)
        offset, box = _best_place((x, y), (size.width, size.height), frame=frame, taken=taken)
        text.set_position((offset[0] / scale, offset[1] / scale))
        taken.append(box.padded(1))
        if _gap((x, y), box) > 9 * scale:
            nearest_edge = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
            xs, ys = zip(*axes.transData.inverted().transform([(x, y), nearest_edge]), strict=True)
            axes.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.7, zorder=1.5, scalex=False, scaley=False)


def _best_place(
    at: tuple[float, float], size: tuple[float, float], *, frame: Bbox, taken: Sequence[Bbox]
) -> tuple[tuple[float, float], Bbox]:
    """The offset (pixels) of a label's centre that covers least, the nearest of those; and the box it fills."""
    from matplotlib.transforms import Bbox

    best: tuple[float, tuple[float, float], Bbox] | None = None
    scale = DPI / 72
    for ring in range(8):
        for turn in range(16):
            angle = 2 * math.pi * turn / 16
            distance = (6 + 7 * ring) * scale
            dx = math.cos(angle) * (distance + size[0] / 2)
            dy = math.sin(angle) * (distance + size[1] / 2)
            box = Bbox.from_bounds(at[0] + dx - size[0] / 2, at[1] + dy - size[1] / 2, *size)
            covered = sum(_shared_area(box, other) for other in taken)
            outside = size[0] * size[1] - _shared_area(box, frame)
            cost = 3 * covered + 9 * outside + 0.4 * size[1] * _gap(at, box) / scale + 0.02 * size[1] * (turn % 8)
            if best is None or cost < best[0]:
                best = (cost, (dx, dy), box)
    assert best is not None
    return best[1], best[2]


def _shared_area(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height))


def _gap(at: tuple[float, float], box: Bbox) -> float:
    """Distance from a place to the nearest edge of a box."""
    return math.hypot(max(box.x0 - at[0], 0.0, at[0] - box.x1), max(box.y0 - at[1], 0.0, at[1] - box.y1))


def _plain(name: str) -> str:
    """A name that matplotlib draws as it is: a dollar sign would start mathematics."""
    return name.replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OutputError: `path` cannot be written.
    """
    staging = path.with_name(STAGING_PREFIX + path.name)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(staging, format="png", metadata={"Software": None})
        os.replace(staging, path)
