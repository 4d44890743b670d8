"""The command line of the harness: the flags of `bench`, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from peftkit.bench.executor import Executor
    from peftkit.bench.suite import Suite


def add_flags(verb: Callable[[str, str], argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb to a parser; `verb` makes one of a name and a summary. Overrides are the caller's to add."""
    bench = verb("bench", "run every missing cell of a suite and compare")
    bench.add_argument("suite", type=Path)
    bench.add_argument("--out", type=Path, help="folder of the results; default runs/bench-NAME")
    bench.add_argument("--advise", action="store_true", help="end with what to take, why, and what is given up")
    bench.add_argument("--dry-run", action="store_true", help="say what memory and time the cells take; run nothing")
    bench.add_argument("--gpu", metavar="NAME or SIZE", help="of --dry-run, such as 'RTX 3060' or 12GiB")
    where = "local: processes of this machine; ray: tasks of a Ray cluster, or of one started here"
    bench.add_argument("--executor", choices=("local", "ray"), default="local", help=where)
    bench.add_argument(
        "--jobs", type=int, metavar="N", help="cells at once; on GPUs each has one of its own; default 1"
    )
    bench.add_argument("--keep-old", action="store_true", help="keep finished cells that other code made")
    bench.add_argument("--even-if-busy", action="store_true", help="measure where others hold the device's memory, too")
    return bench


def answer(options: argparse.Namespace, console: Callable[[], Console], tell: Callable[[str], None]) -> int:
    """Run the suite and print its table, or its cells as JSON; 1 where a cell did not end well."""
    from peftkit.bench.executor import run_suite
    from peftkit.bench.suite import load_suite
    from peftkit.errors import InputError
    from peftkit.report.advice import advise, render_advice
    from peftkit.report.comparison import compare_rows
    from peftkit.report.rows import read_cells
    from peftkit.report.tables import render_terminal

    suite = load_suite(options.suite, options.overrides)
    if options.dry_run:
        return answer_dry_run(suite, options, console)
    if options.gpu is not None:
        raise InputError("--gpu is for --dry-run: cells run on this machine.")
    out = options.out or Path("runs") / f"bench-{suite.name}"
    results = run_suite(
        suite,
        out,
        report_progress=tell,
        executor=_executor(options),
        keep_old=options.keep_old,
        even_if_busy=options.even_if_busy,
    )
    rows = read_cells([out])
    advice = advise(rows) if options.advise else []
    if options.json:
        found = {"out": str(out), "cells": {str(r.folder): r.status for r in results}}
        told = {"advice": [each.to_document() for each in advice]} if options.advise else {}
        print(json.dumps(found | told))
    else:
        console().print(render_terminal(rows, compare_rows(rows, suite.reference)))
        for kind, name in (
            ("table", "report.md"),
            ("page", "report.html"),
            ("plot", "scatter.png"),
            ("data", "results.csv"),
            ("data", "results.parquet"),
        ):
            if (out / name).is_file():
                print(f"{kind}  {out / name}")
        if advice:
            console().print(render_advice(advice))
    return 0 if all(result.status == "ok" for result in results) else 1


def answer_dry_run(suite: Suite, options: argparse.Namespace, console: Callable[[], Console]) -> int:
    """Print what the suite would take; 3 where a cell does not fit, 2 where one cannot work."""
    from peftkit.bench.preview import exit_code, preview, render_preview

    found = preview(suite, options.gpu)
    if options.json:
        print(json.dumps(found.document()))
    else:
        console().print(render_preview(found))
    return exit_code(found)


def _executor(options: argparse.Namespace) -> Executor:
    if options.executor == "ray":
        from peftkit.bench.ray_tasks import Ray

        return Ray(jobs=options.jobs)
    from peftkit.bench.local import Local

    return Local(jobs=1 if options.jobs is None else options.jobs)
