"""Rows as a terminal table and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftkit.report.comparison import Comparison, Difference, brief, probability, signed, unit
from peftkit.report.method_comparison import caveats
from peftkit.report.rows import CellRow, Estimate, Summary, common_metric, summarise
from peftkit.report.tuned import TUNED_MARK, is_tuned, tuning_notes
from peftkit.units import format_bytes, format_count, format_joules, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NOTHING = "–"
LONGEST_NAME = 20
"""Characters of a variant's name in a terminal of 80 columns."""


def render_terminal(rows: Sequence[CellRow], comparison: Comparison | None = None) -> RenderableType:
    """A table for a terminal of 80 columns or more: score, sizes and speed a variant, and what failed, below it.

    A comparison adds a line a variant with its verdict.
    """
    from rich.console import Group
    from rich.text import Text

    summaries = summarise(rows)
    table = _terminal_table(summaries, interval_notes(summaries), memory="memory")
    for name, level in _baselines(summaries).items():
        table.add_row(Text(name, "dim"), Text(level, "dim"), *[""] * 4)
    lines = difference_lines(comparison, summaries) if comparison is not None else []
    return Group(table, Text("\n".join(["", *lines]))) if lines else table


def render_outside(rows: Sequence[CellRow], own: Sequence[CellRow] = ()) -> RenderableType:
    """A table of runs that others made, and what is not comparable about them, also with one's own."""
    from rich.console import Group
    from rich.text import Text

    notes = [f"- {caveat}" for caveat in caveats(rows, own)]
    title = f"{rows[0].outside.source if rows[0].outside else 'others'}, not comparable:"
    return Group(Text(title), _terminal_table(summarise(rows), notes, memory="peak"))


def _terminal_table(summaries: Sequence[Summary], notes: Sequence[str], *, memory: Literal["memory", "peak"]) -> Table:
    """A line a variant; below it the notes, and what failed."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    told = [*notes, *(f"{f.variant} {f.status}, {f.told}" for f in failures(summaries))]
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=Text("\n".join(told)), caption_justify="left"
    )
    table.add_column("variant", no_wrap=True)
    for name in (common_metric(summaries) or "score", "trained", memory, "tok/s", "time"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for summary in summaries:
        held = summary.memory_bytes if memory == "memory" else summary.peak_bytes
        table.add_row(*(Text(cell) for cell in (_shortened(_named(summary)), _score(summary), *_sizes(summary, held))))
    return table


def difference_lines(comparison: Comparison, summaries: Sequence[Summary] = ()) -> list[str]:
    """What a comparison found, a line a variant, and who was left out of it.

    Below the table of these summaries, names are cut as they are there, and who has no score is told there.
    """
    scored = {summary.variant for summary in summaries if summary.score is not None}
    skipped = [
        f"{name} is not compared: {reason}"
        for name, reason in comparison.left_out.items()
        if not summaries or name in scored
    ]
    if not comparison.differences:
        return skipped
    whole = [difference.variant for difference in comparison.differences]
    names = list(map(_shortened, whole)) if summaries else whole
    sizes = [signed(difference) for difference in comparison.differences]
    name_width, size_width = max(map(len, names)), max(map(len, sizes))
    found = [
        f"{name:<{name_width}}  {size:<{size_width}}  {brief(difference, len(names))}"
        for name, size, difference in zip(names, sizes, comparison.differences, strict=True)
    ]
    return [f"{_against(comparison.differences)}:", *found, *skipped]


def render_markdown(
    rows: Sequence[CellRow], comparison: Comparison | None = None, *, own: Sequence[CellRow] = ()
) -> str:
    """A Markdown table, its notes, a table of the comparison, and a list of what failed; every name is escaped.

    Below runs that others made it says what is not comparable about them, also with one's `own`.
    """
    summaries = summarise(rows)
    main = common_metric(summaries)
    others = list(dict.fromkeys(name for s in summaries for name in s.metrics if name != s.main))
    besides = {name: told for name, told in BESIDES.items() if any(told(s) != NOTHING for s in summaries)}
    header = [
        "variant",
        escape_markdown(main or "score"),
        *map(escape_markdown, others),
        "trained",
        "memory",
        "peak",
        "tokens/s",
        "time",
        *besides,
        "seeds",
    ]
    lines = [_markdown_row(header), "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    for summary in summaries:
        trained, memory, speed, time = _sizes(summary, summary.memory_bytes)
        cells = [
            escape_markdown(_named(summary)),
            _score(summary),
            *(_number(_value(summary.metrics.get(name))) for name in others),
        ]
        cells += [trained, memory, _measured(summary.peak_bytes, format_bytes), speed, time]
        cells += [told(summary) for told in besides.values()]
        lines.append(_markdown_row([*cells, f"{summary.ended_well}/{len(summary.rows)}"]))
    for name, level in _baselines(summaries).items():
        lines.append(_markdown_row([name, level, *[""] * (len(header) - 2)]))
    foreign = caveats([row for row in rows if row.outside is not None], own)
    notes = interval_notes(summaries) if not foreign else []
    failed = [f"- **{escape_markdown(f.variant)}** {f.status}: {escape_markdown(f.told)}" for f in failures(summaries)]
    blocks = [
        lines,
        notes,
        [f"- {escape_markdown(caveat)}" for caveat in foreign],
        *_markdown_differences(comparison, summaries),
        failed,
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _markdown_differences(comparison: Comparison | None, summaries: Sequence[Summary]) -> list[list[str]]:
    """A sentence, a table and who was left out; nothing without a difference."""
    if comparison is None or not comparison.differences:
        return []
    found = comparison.differences
    header = ["variant", "difference", "p", "adjusted p", "verdict"]
    lines = [_markdown_row(header), "|---|---:|---:|---:|---|"]
    for each in found:
        chances = [probability(p).removeprefix("= ") for p in (each.p_value, each.adjusted_p)]
        cells = [escape_markdown(each.variant), signed(each), *map(escape_markdown, [*chances, each.verdict])]
        lines.append(_markdown_row(cells))
    scored = {summary.variant for summary in summaries if summary.score is not None}
    skipped = [
        f"- **{escape_markdown(name)}** is not compared: {escape_markdown(reason)}"
        for name, reason in comparison.left_out.items()
        if name in scored
    ]
    bases = {each.basis for each in found}
    over = "seeds and examples" if "seeds and examples" in bases else "examples"
    alone = "; over examples alone where both sides have one seed" if len(bases) > 1 else ""
    note = f"95 % intervals and p-values over {over}{alone}; p adjusted by Holm for {len(found)} comparisons."
    told = _against(found)
    return [[f"{escape_markdown(told[0].upper() + told[1:])}. {note}"], lines, skipped]


def _against(found: Sequence[Difference]) -> str:
    """What was compared with what: `points of accuracy against lora, 1,008 examples and 3 seeds in pairs`."""
    first = found[0]
    seeds = {each.num_seeds if each.paired_seeds else 0 for each in found}
    count = seeds.pop() if len(seeds) == 1 else 0
    paired = f" and {count} seed{'s'[: count != 1]}" if count else ""
    names = " and ".join(dict.fromkeys(each.reference for each in found))
    examples = " and ".join(dict.fromkeys(f"{each.num_examples:,}" for each in found))
    return f"{unit(first.metric)} against {names}, {examples} examples{paired} in pairs"


@dataclass(frozen=True, slots=True)
class Failure:
    """Seeds of one variant that ended alike."""

    variant: str
    status: str
    reason: str
    seeds: tuple[int, ...]

    @property
    def told(self) -> str:
        """`seeds 0, 2: why`."""
        return f"seed{'s'[: len(self.seeds) != 1]} {', '.join(map(str, self.seeds))}: {self.reason}"


def failures(summaries: Sequence[Summary]) -> list[Failure]:
    """What did not end well, seeds of a variant with the same reason together."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for summary in summaries:
        for row in summary.failures:
            seeds.setdefault((summary.variant, row.status, " ".join(row.reason.split())), []).append(row.seed)
    return [Failure(*key, tuple(found)) for key, found in seeds.items()]


def interval_notes(summaries: Sequence[Summary]) -> list[str]:
    """Sentences that say what the intervals and the columns mean."""
    scores = [summary.score for summary in summaries if summary.score is not None]
    notes = tuning_notes(summaries)
    if scores:
        sizes = sorted({score.n for score in scores})
        counted = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        notes.append(f"Scored on {counted} examples; {_bases({score.basis for score in scores})}.")
    if any(summary.memory_bytes is not None for summary in summaries):
        notes.append("memory: peak of the training steps above what was held before them; time: those steps alone.")
    return notes


def format_estimate(score: Estimate | None) -> str:
    """`0.869 [0.861, 0.877]`; without the interval where there is none."""
    if score is None or score.low is None or score.high is None:
        return _number(_value(score))
    return f"{_number(score.value)} [{_number(score.low)}, {_number(score.high)}]"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*`\[\]~])", r"\\\1", text)


def _bases(bases: set[str]) -> str:
    named = {
        "seeds and examples": "a hierarchical bootstrap over seeds and examples",
        "seeds": "Student's t over seeds",
        "examples": "a bootstrap over examples",
    }
    found = [text for basis, text in named.items() if basis in bases]
    if not found:
        return "no intervals"
    alone = " alone where there is one seed or all agree" if len(found) > 1 and "examples" in bases else ""
    return f"95 % intervals: {', or '.join(found)}{alone}"


def _named(summary: Summary) -> str:
    done, planned = summary.ended_well, len(summary.rows)
    name = summary.variant + TUNED_MARK * is_tuned(summary)
    return name if done in (0, planned) else f"{name} ({done}/{planned})"


def _score(summary: Summary) -> str:
    """`0.869 [0.861, 0.877]`, or how the variant ended."""
    score = summary.score
    if score is None:
        return next((row.status for row in summary.rows if row.status != "ok"), "not scored")
    return format_estimate(score)


def _sizes(summary: Summary, memory_bytes: float | None) -> list[str]:
    """Parameters trained, memory, tokens a second, seconds of training."""
    return [
        _measured(summary.trainable, format_count),
        _measured(memory_bytes, format_bytes),
        _measured(summary.tokens_per_second, format_count),
        _measured(summary.train_seconds, format_seconds),
    ]


def _measured(value: float | None, written: Callable[[float], str]) -> str:
    return NOTHING if value is None else written(value)


BESIDES: dict[str, Callable[[Summary], str]] = {
    "answers/s": lambda summary: _measured(summary.served.get("samples_per_second"), format_count),
    "latency p50": lambda summary: _measured(summary.served.get("latency_seconds_p50"), format_seconds),
    "latency p90": lambda summary: _measured(summary.served.get("latency_seconds_p90"), format_seconds),
    "energy": lambda summary: _measured(summary.energy_joules, format_joules),
    "to target": lambda summary: _measured(summary.target_seconds, format_seconds),
}
"""Columns of what only some machines and suites measure; shown where a variant has it."""


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _number(value: float | None) -> str:
    """Three decimals below ten, fewer above."""
    if value is None:
        return NOTHING
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.4g}"


def _baselines(summaries: Sequence[Summary]) -> dict[str, str]:
    """What scores without a model, by name: the same for all, or from lowest to highest."""
    scores = [summary.score for summary in summaries if summary.score is not None]
    found = {"chance": [score.chance for score in scores], "majority": [score.majority for score in scores]}
    told = {name: sorted({_number(level) for level in levels if level is not None}) for name, levels in found.items()}
    return {
        name: levels[0] if len(levels) == 1 else f"{levels[0]} to {levels[-1]}"
        for name, levels in told.items()
        if levels
    }


def _shortened(name: str) -> str:
    """The name, its middle left out when it is long: a grid's names differ at the end."""
    if len(name) <= LONGEST_NAME:
        return name
    tail = (LONGEST_NAME - 1) // 2
    return f"{name[: LONGEST_NAME - 1 - tail]}…{name[-tail:]}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
