"""A benchmark's report: `report.md` and `report.html`, with `results.{csv,parquet}` and plots."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.files import write_text
from peftkit.report.advice import Advice, advice_markdown, advise
from peftkit.report.comparison import Comparison, compare_rows, write_differences
from peftkit.report.method_comparison import SOURCE
from peftkit.report.numbers import write_csv, write_parquet
from peftkit.report.page import write_page
from peftkit.report.plots import scatter
from peftkit.report.rows import CellRow, summarise
from peftkit.report.tables import escape_markdown, render_markdown
from peftkit.report.tuned import tuning_notes

REPORT_NAME = "report.md"
RESULTS_NAME = "results.csv"
PARQUET_NAME = "results.parquet"
DIFFERENCES_NAME = "differences.csv"
PLOT_NAME = "scatter.png"


def write_report(
    out: Path, suite_name: str, rows: Sequence[CellRow], *, description: str = "", reference: str | None = None
) -> Path:
    """Write tables, page, plot, numbers and how to get them again into `out`; the path of `report.md`.

    Args:
        rows: those that others made are shown apart, and compared with none.
        reference: the variant that the others are compared with; None leaves the choice to `compare_rows`.

    Raises:
        InputError: there is no variant of the reference's name.
        OutputError: `out` cannot be written.
    """
    everything = rows
    outside = [row for row in rows if row.outside is not None]
    own = [row for row in rows if row.outside is None]
    rows, beside = (own, outside) if own else (outside, [])
    comparison = compare_rows(rows, reference)
    advice = advise(own) if own else []
    write_csv(everything, out / RESULTS_NAME)
    write_parquet(everything, out / PARQUET_NAME)
    if comparison.differences:
        write_differences(comparison, out / DIFFERENCES_NAME)
    else:
        (out / DIFFERENCES_NAME).unlink(missing_ok=True)
    plotted = scatter(own, out / PLOT_NAME, title=suite_name)
    parts = [f"# {escape_markdown(suite_name)}", render_markdown(rows, comparison)]
    if advice:
        parts.append(advice_markdown(advice))
    if plotted:
        parts.append(f"![Quality against training memory and against speed]({PLOT_NAME})")
    else:
        (out / PLOT_NAME).unlink(missing_ok=True)
    if description.strip():
        parts.append(f"## About this benchmark\n\n{description.strip()}")
    if beside:
        parts += [f"## {SOURCE}", render_markdown(beside, own=own)]
    parts.append(_reproduction(out, rows))
    write_text(out / REPORT_NAME, "\n\n".join(part.strip() for part in parts) + "\n")
    _write_page(out, suite_name, [*rows, *beside], comparison, advice, description=description)
    return out / REPORT_NAME


def _write_page(
    out: Path,
    suite_name: str,
    rows: Sequence[CellRow],
    comparison: Comparison,
    advice: Sequence[Advice],
    *,
    description: str,
) -> None:
    """The page, which also says what cannot be told from the best."""
    own = [row for row in rows if row.outside is None]
    best = next((summary.variant for summary in summarise(own) if summary.score is not None), None)
    reached = {difference.reference for difference in comparison.differences}
    against_best = compare_rows(own, best).differences if best is not None and best not in reached else []
    differences = [*comparison.differences, *against_best]
    left_out = comparison.left_out
    told = "\n\n".join([description.strip(), *tuning_notes(summarise(own), mark="")])
    write_page(out, suite_name, rows, differences, description=told, left_out=left_out, advice=advice)


def _reproduction(out: Path, rows: Sequence[CellRow]) -> str:
    lines = ["## How to reproduce", ""]
    if (out / "suite.yaml").exists():
        command = f"peftkit bench {shlex.quote(str(out / 'suite.yaml'))} --out {shlex.quote(str(out))}"
        lines += ["```", command, "```", "", "Finished cells are kept; take another folder to run everything again."]
    lines += [f"Every number of every cell: [{RESULTS_NAME}]({RESULTS_NAME})."]
    lines += [f"The same for data frames: [{PARQUET_NAME}]({PARQUET_NAME})."]
    if (out / DIFFERENCES_NAME).exists():
        lines += [f"Every difference: [{DIFFERENCES_NAME}]({DIFFERENCES_NAME})."]
    environment = _common_environment(rows)
    if environment:
        lines += ["", "| environment | |", "|---|---|"]
        lines += [f"| {escape_markdown(key)} | {escape_markdown(value)} |" for key, value in environment.items()]
    return "\n".join(lines)


def _common_environment(rows: Sequence[CellRow]) -> dict[str, str]:
    """Each entry of the cells' environments; differing values side by side."""
    values: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.record is not None:
            for key, value in _entries(row.record.environment).items():
                values.setdefault(key, {})[value] = None
    return {key: ", ".join(found) for key, found in values.items()}


def _entries(content: dict[str, Any], prefix: str = "") -> dict[str, str]:
    entries: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            entries |= _entries(value, f"{prefix}{key} ")
        elif value is not None:
            entries[prefix + key] = str(value)
    return entries
