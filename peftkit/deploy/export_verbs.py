"""The command line of exports: their flags, and what they answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.deploy.gguf_kinds import KINDS

if TYPE_CHECKING:
    from peftkit.deploy.export import ExportReport
    from peftkit.deploy.serving_check import ServingReport

Say = Callable[[str], None]
TARGETS = ("gguf", "ollama", "onnx")
SERVERS = ("vllm", "sglang", "tgi")


def add_flags(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the verb to a parser; `verb` makes one of a name and a summary."""
    export = verb("export", "write a model or adapter for another engine, then check that it answers alike")
    what = "a merged model, a run, an adapter, or a packaged backbone"
    export.add_argument("reference", metavar="DIR", help=what)
    goal = export.add_mutually_exclusive_group(required=True)
    goal.add_argument("--to", choices=TARGETS, help="what to write")
    goal.add_argument(
        "--for", dest="server", choices=SERVERS, help="say whether it serves this adapter; writes nothing"
    )
    export.add_argument("--out", type=Path, help="folder of the files; default NAME-TO")
    export.add_argument("--kind", choices=KINDS, help="how a GGUF holds its matrices; default: as the weights are")
    export.add_argument("--base", help="the base of an adapter, where it doesn't know it or it has moved")
    export.add_argument("--no-parity", action="store_true", help="write without asking torch and the engine the same")


def answer_export(options: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str, int]:
    """Export, or check an adapter; the document, what a terminal shows, and the exit code."""
    from peftkit.errors import InputError

    if options.server is not None:
        given = {"--out": options.out, "--kind": options.kind, "--base": options.base}
        ignored = [flag for flag, value in given.items() if value is not None] + ["--no-parity"] * options.no_parity
        if ignored:
            raise InputError(f"{' and '.join(ignored)} would be ignored: --for writes nothing. Leave it out.")
        from peftkit.deploy.serving_check import check_serving

        checked = check_serving(options.reference, options.server)
        return checked.model_dump(mode="json", exclude_none=True), _render_check(checked), 0 if checked.accepted else 1
    from peftkit.deploy.export import export

    report = export(
        options.reference,
        options.to,
        options.out,
        kind=options.kind,
        base=options.base,
        parity=not options.no_parity,
        say=say,
    )
    return report.model_dump(mode="json", exclude_none=True), _render_report(report), 0


def _render_report(report: ExportReport) -> str:
    from peftkit.units import format_bytes

    parity = report.parity
    lines = [f"{report.architecture} as {report.to}, {report.kind}"]
    if parity.status == "not checked":
        lines.append(f"parity   not checked: {parity.reason}")
    words = []
    if parity.same_tokens is not None:
        words.append(f"{parity.same_tokens} of {parity.prompts} prompts in the same tokens")
    if parity.identical_answers is not None:
        ties = f" (and {parity.swapped_ties} but for ties)" if parity.swapped_ties else ""
        words.append(f"{parity.identical_answers} of {parity.prompts} greedy answers identical{ties}")
    if parity.top1_agreement is not None:
        words.append(f"top-1 agreement {parity.top1_agreement:.2%} at {parity.positions} positions")
    if parity.mean_kl is not None:
        words.append(f"mean KL {parity.mean_kl:.3g} nats (allowed {parity.kl_limit:g})")
    elif parity.max_abs_difference is not None:
        words.append(f"largest difference {parity.max_abs_difference:.2g} of the largest output")
    if parity.engine is not None:
        lines.append(f"parity   torch and {parity.engine}")
        lines += [f"         {word}" for word in words]
    lines += [f"note     {note}" for note in report.notes]
    for name, size in report.files.items():
        lines.append(f"file     {Path(report.out) / name} ({format_bytes(size)})")
    if report.to == "ollama":
        lines.append(f"next     ollama create NAME -f {Path(report.out) / 'Modelfile'}")
    return "\n".join(lines)


def _render_check(found: ServingReport) -> str:
    if found.accepted:
        return f"{found.engine} serves {found.adapter} as it is\n{found.command}"
    lines = [f"{found.engine} does not serve {found.adapter} as it is"]
    for change in found.changes:
        lines += [f"  {change.problem}", f"    -> {change.remedy}"]
    return "\n".join(lines)
