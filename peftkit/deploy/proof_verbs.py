"""The command line of merge and verify: their flags, and what each of them answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
ONTO = ("dequantized", "original", "requantized")


@dataclass(frozen=True, slots=True)
class Answer:
    """The same as a JSON document and as a terminal shows it, and the exit code."""

    document: dict[str, Any]
    lines: list[str]
    code: int = 0


def add_flags(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the verbs to a parser; `verb` makes one of a name and a summary."""
    merge = verb("merge", "fold an adapter into its base, then prove that both answer alike")
    merge.add_argument("reference", type=Path, metavar="RUN_OR_ADAPTER")
    merge.add_argument("--out", type=Path, required=True)
    merge.add_argument("--base", help="the base to fold into; default: the one the adapter was trained on")
    merge.add_argument("--onto", choices=ONTO, default=ONTO[0], help="for quantized bases")
    verify = verb("verify", "whether B answers like A, found out from the files on disk; exit 1 where it does not")
    verify.add_argument("reference", metavar="A", help="a run, an adapter or a model")
    verify.add_argument("candidate", type=Path, metavar="B", help="a model's folder, or another run or adapter")
    verify.add_argument("--base", help="the base of A, where A doesn't know it or it has moved")
    verify.add_argument("--on", type=Path, metavar="RECIPE", help="whose data to ask by; default: A's own, or texts")
    verify.add_argument("--onto", choices=ONTO, help="which weights of a quantized base B has")
    for each in (merge, verify):
        each.add_argument(
            "--streamed",
            action="store_true",
            default=None,
            help="ask both layer by layer from disk; default: where memory is too small for one of them",
        )


def answer_merge(options: argparse.Namespace, say: Say) -> Answer:
    """Merge, and show the proof."""
    from peftkit.deploy.merge import merge
    from peftkit.deploy.model_card import summarise

    report = merge(
        options.reference, options.out, base=options.base, onto=options.onto, streamed=options.streamed, say=say
    )
    lines = [*summarise(report.verification, report.weights), f"merged model  {options.out}"]
    return Answer(report.model_dump(mode="json", exclude_none=True), lines)


def answer_verify(options: argparse.Namespace, say: Say) -> Answer:
    """Compare, and show how far apart they are."""
    from peftkit.deploy.model_card import summarise
    from peftkit.deploy.proof import verify_models

    proof = verify_models(
        options.reference,
        options.candidate,
        base=options.base,
        onto=options.onto,
        on=options.on,
        streamed=options.streamed,
        say=say,
    )
    verdict = proof.verification
    lines = summarise(verdict, proof.weights)
    lines += [f"- {failure}" for failure in verdict.failures]
    lines.append(
        f"{options.candidate} answers like {options.reference}"
        if verdict.passed
        else f"{options.candidate} does not answer like {options.reference}"
    )
    return Answer(proof.model_dump(mode="json", exclude_none=True), lines, 0 if verdict.passed else 1)


ANSWERS: dict[str, Callable[[argparse.Namespace, Say], Answer]] = {"merge": answer_merge, "verify": answer_verify}
