"""The command line of finished runs: flags of report and compare, and what each of them answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from peftkit.report.rows import CellRow

Say = Callable[[str], None]
Answer = tuple[Any, "RenderableType | str", int]
"""The same as a JSON document and as a terminal shows it (a string as it is), and the exit code."""


def add_flags(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the two verbs to a parser; `verb` makes one of a name and a summary."""
    report = verb("report", "tables and plots of finished runs")
    report.add_argument("folders", type=Path, nargs="*", metavar="DIR")
    report.add_argument("--reference", metavar="NAME", help="variant to compare with; default: the suite's, or lora")
    report.add_argument("--advise", action="store_true", help="end with what to take, why, and what is given up")
    report.add_argument("--out", type=Path, metavar="DIR", help="write report.md, report.html and the numbers there")
    layout = "result files of PEFT's method_comparison"
    report.add_argument("--import-peft", type=Path, metavar="DIR", help=f"show {layout} beside the runs, or alone")
    report.add_argument("--export-peft", type=Path, metavar="DIR", help=f"write the runs as {layout}")
    compare = verb("compare", "test B against A over the same examples; exit 1 where B is significantly worse")
    compare.add_argument("one", type=Path, metavar="A", help="a run's folder, or a benchmark's")
    compare.add_argument("other", type=Path, metavar="B", help="another of the same kind")
    compare.add_argument("--metric", metavar="NAME", help="default: the one that decides in both")


def answer_report(options: argparse.Namespace, say: Say) -> Answer:
    """Show the runs and those of others; export them, or write a report, where that is asked."""
    from rich.console import Group

    from peftkit.report.advice import advise, render_advice
    from peftkit.report.comparison import compare_rows
    from peftkit.report.rows import as_documents, named_reference
    from peftkit.report.tables import render_outside, render_terminal

    own, outside = _rows(options, say)
    if options.json and options.reference and options.out is None:
        raise InputError("--json prints the runs as they are and compares nothing: leave --reference out.")
    if options.advise and not own:
        raise InputError("--advise needs runs of your own: name their folders.")
    reference = options.reference or named_reference(options.folders)
    if options.export_peft is not None:
        _export(own, options.export_peft, say)
    if options.out is not None:
        _write(options, [*own, *outside], reference, say)
    advice = advise(own) if options.advise else []
    if options.json:
        documents = as_documents([*own, *outside])
        told = {"runs": documents, "advice": [each.to_document() for each in advice]}
        return told if options.advise else documents, "", 0
    shown: list[RenderableType] = [render_terminal(own, compare_rows(own, reference))] if own else []
    shown += [render_outside(outside, own)] if outside else []
    shown += [render_advice(advice)] if advice else []
    return None, Group(*shown), 0


def answer_compare(options: argparse.Namespace, say: Say) -> Answer:
    """Compare two runs, or the variants of two benchmarks."""
    from peftkit.report.comparison import compare_folders
    from peftkit.report.tables import difference_lines

    comparison = compare_folders(options.one, options.other, options.metric)
    return comparison.to_document(), "\n".join(difference_lines(comparison)), 1 if comparison.regressions else 0


def _rows(options: argparse.Namespace, say: Say) -> tuple[list[CellRow], list[CellRow]]:
    """One's own runs, and those of others."""
    from peftkit.report.method_comparison import read_results
    from peftkit.report.rows import find_cells, read_cells

    if not options.folders and options.import_peft is None:
        raise InputError("report of what? Name folders that train or bench wrote, or --import-peft DIR.")
    own = read_cells([cell for folder in options.folders for cell in find_cells(folder)])
    if options.folders and not own:
        raise InputError(f"no finished run below {', '.join(map(str, options.folders))}.")
    if options.import_peft is None:
        return own, []
    outside, faults = read_results(options.import_peft)
    for fault in faults:
        say(f"left out: {fault}")
    return own, outside


def _export(own: Sequence[CellRow], out: Path, say: Say) -> None:
    from peftkit.report.peft_layout import write_results

    if not own:
        raise InputError("--export-peft writes runs of your own: name their folders.")
    for reason in write_results(own, out):
        say(f"not exported: {reason}")
    say(f"exported to {out}")


def _write(options: argparse.Namespace, rows: Sequence[CellRow], reference: str | None, say: Say) -> None:
    from peftkit.files import write_text
    from peftkit.report.document import write_report
    from peftkit.report.method_comparison import SOURCE
    from peftkit.report.page_data import SUITE_FILE
    from peftkit.report.rows import MANIFEST_NAME, read_manifest

    name = (
        ", ".join(folder.resolve().name for folder in options.folders)
        or f"{SOURCE}: {options.import_peft.resolve().name}"
    )
    description = ""
    if len(options.folders) == 1 and (options.folders[0] / MANIFEST_NAME).exists():
        manifest, suite = read_manifest(options.folders[0]), options.folders[0] / SUITE_FILE
        name, description = manifest.get("suite", name), manifest.get("description", "")
        if suite.is_file() and options.out.resolve() != options.folders[0].resolve():
            write_text(options.out / SUITE_FILE, suite.read_text(encoding="utf-8"))  # what runs all of it again
    write_report(options.out, name, rows, description=description, reference=reference)
    say(f"wrote report.md, report.html and the numbers to {options.out}")


ANSWERS: dict[str, Callable[[argparse.Namespace, Say], Answer]] = {
    "report": answer_report,
    "compare": answer_compare,
}
