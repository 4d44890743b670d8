"""The proof in a process of its own, which knows nothing but what lies on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftkit import errors
from peftkit.backbones.quiet import hush_bitsandbytes
from peftkit.deploy.adapter import Onto
from peftkit.deploy.verification import REPORT_NAME, Proof, Question, Say
from peftkit.deploy.verify import examine
from peftkit.errors import InputError, OutOfMemory, PeftkitError, RecipeError, VerificationFailed
from peftkit.files import write_json


def verify_models(
    reference: str | Path,
    candidate: str | Path,
    *,
    base: str | None = None,
    onto: Onto | None = None,
    on: str | Path | None = None,
    max_examples: int = 200,
    streamed: bool | None = None,
    digests: dict[str, str] | None = None,
    say: Say = lambda text: None,
) -> Proof:
    """Whether a candidate answers like its reference, found out by a fresh process from the files on disk.

    Args:
        reference: a run, an adapter, a model folder, a packaged backbone or a hub id.
        candidate: a model folder that transformers reads, or another run or adapter.
        base: the reference adapter's, where it doesn't know it or it has moved.
        onto: which weights of a quantized base the candidate was folded onto.
        on: a recipe whose data and task to ask by; None takes the reference's own, or built-in texts.
        max_examples: test examples that the task's metrics are measured on.
        streamed: read weights layer by layer; None decides by the memory that is free.
        digests: SHA-256 of the candidate's files, from when they were written; None takes those of its merge report.
        say: told what is being done.

    Raises:
        InputError: the reference, or the recipe, cannot be used. What is wrong with the candidate is a failure.
        OutOfMemory: the process was killed.
    """
    if not Path(candidate).is_dir():
        raise InputError(f"{candidate} is no folder. Give a merged model, a run or an adapter.")
    if digests is None:
        digests = recorded_digests(Path(candidate))
    question = Question(
        reference=str(reference),
        candidate=str(candidate),
        base=base,
        onto=onto,
        on=None if on is None else str(on),
        max_examples=max_examples,
        streamed=streamed,
        digests=digests,
    )
    return prove(question, say)


def recorded_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a merged model's files, from the report beside them; nothing where there is none."""
    path = folder / REPORT_NAME
    try:
        written = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): str(digest) for name, digest in written.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def prove(question: Question, say: Say) -> Proof:
    """Answer a question in a fresh process.

    Raises:
        PeftkitError: what that process raised.
        OutOfMemory: it was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "peftkit.deploy.proof", str(answer)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it ended at once: what it has left says why
                    child.stdin.write(question.model_dump_json() + "\n")
                    child.stdin.flush()  # and kept open: its end tells the child that nobody waits any more
                for line in child.stdout:
                    say(line.rstrip("\n"))
                child.wait()
            finally:
                child.kill()
        if not answer.is_file():
            if child.returncode < 0:
                raise OutOfMemory(
                    f"the process that asks both models was ended by signal {-child.returncode}, as it is when memory "
                    "runs out. Pass --streamed to read them layer by layer."
                )
            raise VerificationFailed(
                f"the process that asks both models ended with {child.returncode}; it said why above."
            )
        told = json.loads(answer.read_text(encoding="utf-8"))
    if "fault" in told:
        raise _revive(told["fault"], told["message"])
    return Proof.model_validate(told["proof"])


def main(arguments: Sequence[str]) -> int:
    """Read a question from standard input, and leave the answer in the file that is named."""
    (path,) = arguments
    hush_bitsandbytes()
    question = Question.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        told: dict[str, Any] = {
            "proof": examine(question, lambda text: print(text, flush=True)).model_dump(mode="json", exclude_none=True)
        }
    except PeftkitError as fault:
        told = {"fault": type(fault).__name__, "message": str(fault)}
    write_json(Path(path), told)
    return 0


def _end_with_parent() -> None:
    """End at once when the process that asked is gone, however it ended."""
    sys.stdin.read()
    os._exit(1)


def _revive(kind: str, message: str) -> PeftkitError:
    """The same fault here, of its own class where that takes a message alone."""
    known = {
        name: each for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, PeftkitError)
    }
    return InputError(message) if kind == RecipeError.__name__ else known.get(kind, PeftkitError)(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
