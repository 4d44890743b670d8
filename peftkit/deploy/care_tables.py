"""Reports about adapters as people read them on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from peftkit.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from peftkit.deploy.care import AdapterDifference, Inspection
    from peftkit.deploy.combine import CombineReport
    from peftkit.deploy.exams import ScoreRow
    from peftkit.deploy.resize import ResizeReport

NOTHING = "–"
ROUNDING = 1e-6
"""A relative error below this is that of float32 alone."""
LONGEST_PATH = 34
"""Characters of a module's path in a terminal of 80 columns."""
MOST_ROWS = 12
"""Modules or tensors that a terminal shows of a long list; --json has all."""


def render_combined(report: CombineReport, out: str) -> RenderableType:
    """What went in, what was lost, and the scores of parts and combination in one table."""
    parts = _table("part", "method", "rank", "weight")
    for part in report.parts:
        parts.add_row(part.name, part.method, str(part.rank or NOTHING), f"{part.weight:.4g}")
    how = report.how + (" of factors" if report.space == "factors" else "")
    density = f", density {report.density:g}" if report.density is not None else ""
    lines = [f"{how}{density}: rank {report.rank} at {report.modules} modules of {report.base or 'an unnamed base'}"]
    if report.error is not None:
        kind = "products of different parts" if report.space == "factors" else "lost to the rank"
        exact = report.error < ROUNDING
        lines.append(
            "exact but for rounding" if exact else f"error  {report.error:.3g} of the exact result's norm: {kind}"
        )
    lines.append(f"head   {report.head}")
    shown: list[RenderableType] = [parts, Text("\n".join(lines))]
    if report.scores:
        shown += [Text("\nvalidation"), _scores(report.scores), Text("\n".join(_cost_lines(report)))]
    if report.test_scores:
        shown += [Text("\ntest, which the search has not seen"), _scores(report.test_scores)]
    notes = [f"note   {note}" for note in report.notes]
    return Group(*shown, Text("\n".join([*notes, f"adapter  {out}"])))


def render_inspection(found: Inspection) -> RenderableType:
    """The facts, then a line a layer, then what is no delta."""
    base, said = found.base, found.training
    numbers = ", ".join(word for word in (base.dtype, base.quantization) if word not in (None, "none"))
    digest = f", weights {base.weights_digest}" if base.weights_digest else ", digest not recorded"
    rows = [
        ("method", f"{found.method} ({found.peft_type})"),
        ("rank", ", ".join(map(str, found.ranks)) + f", alpha {found.alpha:g}" if found.ranks and found.alpha else ""),
        ("targets", ", ".join(f"{name} x {count}" for name, count in found.targets.items())),
        ("saved whole", ", ".join(found.modules_to_save)),
        ("head", found.head),
        ("size", f"{format_count(found.num_params)} in {', '.join(found.dtypes)}, {format_bytes(found.num_bytes)}"),
        ("digest", found.digest[:16]),
        ("base", f"{base.name or 'not recorded'}" + (f" ({numbers})" if numbers else "") + digest),
        ("delta", found.delta),
    ]
    if said is not None:
        spent = f", {format_seconds(said.train_seconds)}" if said.train_seconds is not None else ""
        rows.append(("trained", f"{said.task} on {said.data}, seed {said.seed}, recipe {said.recipe_digest}{spent}"))
        scores = said.metrics or said.validation_metrics
        rows.append(("scored", ", ".join(f"{name} {metric.value:.4f}" for name, metric in scores.items())))
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in rows:
        if value:
            facts.add_row(Text(name, "dim"), Text(value))
    shown: list[RenderableType] = [facts]
    if found.layers:
        layers = _table("layer", "modules", "norm", "effective rank", "strongest", left=("layer", "strongest"))
        for layer in found.layers:
            number = "outside" if layer.layer is None else str(layer.layer)
            layers.add_row(
                number, str(layer.modules), f"{layer.norm:.4g}", f"{layer.effective_rank:.2f}", layer.strongest
            )
        layers.add_section()
        layers.add_row("all", str(len(found.modules)), f"{found.norm:.4g}", f"{found.effective_rank:.2f}", "")
        shown += [Text(""), layers]
    if found.others:
        others = _table("tensor", "shape", "norm")
        for tensor in found.others[:MOST_ROWS]:
            others.add_row(tensor.name, " x ".join(map(str, tensor.shape)), f"{tensor.norm:.4g}")
        shown += [Text(""), others, *_more(len(found.others))]
    return Group(*shown)


def render_difference(found: AdapterDifference) -> RenderableType:
    """What is said differently, then the modules that differ most."""
    shown: list[RenderableType] = [Text(f"A  {found.a}\nB  {found.b}")]
    if found.same_weights:
        shown.append(Text("the same weights, byte for byte"))
    said = [(key, mine, theirs) for each in (found.config, found.base) for key, (mine, theirs) in each.items()]
    if said:
        table = _table("setting", "A", "B", left=("setting", "A", "B"))
        for key, mine, theirs in said:
            table.add_row(key, _short(mine), _short(theirs))
        shown += [Text(""), table]
    if found.recipe:
        shown.append(Text("\nrecipes\n" + "\n".join(f"  {line}" for line in found.recipe)))
    if found.modules:
        table = _table("module", "norm A", "norm B", "|A - B| / |A|", "cosine")
        furthest = sorted(found.modules, key=lambda module: -(module.relative or 0.0))[:MOST_ROWS]
        for module in furthest:
            numbers = [f"{module.norm_a:.4g}", f"{module.norm_b:.4g}", _number(module.relative), _number(module.cosine)]
            table.add_row(_tail(module.path), *numbers)
        table.add_section()
        table.add_row(f"all {len(found.modules)}", "", "", _number(found.relative), _number(found.cosine))
        shown += [Text(""), table]
    for name, paths in (("A", found.only_in_a), ("B", found.only_in_b)):
        if paths:
            shown.append(Text(f"only in {name}: {', '.join(paths[:3])}" + (", ..." if len(paths) > 3 else "")))
    changed = [tensor for tensor in found.tensors if tensor.relative != 0.0]
    if found.tensors:
        shown.append(Text(f"{len(changed)} of {len(found.tensors)} other tensors differ"))
        shown += [Text(f"  {tensor.name}  {_number(tensor.relative)}") for tensor in changed[:MOST_ROWS]]
    return Group(*shown)


def render_resized(report: ResizeReport, out: str) -> RenderableType:
    """What it lost, and the scores before and after."""
    before = ", ".join(map(str, report.ranks_before))
    size = f"{format_count(report.num_params_before)} -> {format_count(report.num_params)} parameters"
    lines = [f"rank {before} -> {report.rank}, {size}"]
    if report.error is not None:
        worst = max(report.modules, key=lambda module: module.error or 0.0)
        lines.append(
            f"error  {report.error:.3g} of the delta's norm; most at {_tail(worst.path)}, {worst.error or 0.0:.3g}"
        )
    lines += [f"note   {note}" for note in report.notes]
    shown: list[RenderableType] = [Text("\n".join(lines))]
    if report.scores:
        shown += [Text("\nvalidation"), _scores(report.scores)]
    return Group(*shown, Text(f"adapter  {out}"))


def _scores(rows: Sequence[ScoreRow]) -> Table:
    """Rows are adapters, columns tasks; a task that an adapter's head cannot answer is left open."""
    tasks = {label: score.metric for row in rows for label, score in row.scores.items()}
    table = _table("adapter", *(f"{label}, {metric}" for label, metric in tasks.items()))
    for row in rows:
        cells = []
        for label in tasks:
            score = row.scores.get(label)
            if score is None:
                cells.append(NOTHING)
                continue
            known = score.metrics.get(score.metric)
            interval = known is not None and known.low is not None and known.high is not None
            cells.append(f"{score.value:.3f}" + (f" [{known.low:.3f}, {known.high:.3f}]" if known and interval else ""))
        table.add_row(row.name, *cells)
    return table


def _cost_lines(report: CombineReport) -> list[str]:
    """One line a task: what the combination costs against each part alone."""
    lines = []
    for label, costs in report.costs.items():
        told = ", ".join(f"{value:+.4f} against {name}" for name, value in costs.items())
        lines.append(f"cost   {label}: {told} (above 0 is worse)")
    if report.search is not None:
        best = report.search.best
        lines.append(f"search {len(report.search.trials)} trials, mean cost {best.cost:+.4f} of the best part's score")
    return lines


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    from rich.box import SIMPLE_HEAD

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 or column in left else "right", overflow="fold")
    return table


def _more(count: int) -> list[RenderableType]:
    return [Text(f"and {count - MOST_ROWS} more: --json has all", "dim")] if count > MOST_ROWS else []


def _tail(path: str) -> str:
    """The end of a module's path: its layer and its name are there."""
    return path if len(path) <= LONGEST_PATH else "…" + path[1 - LONGEST_PATH :]


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
