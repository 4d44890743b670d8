"""The flags of `peftkit eval` that ask for tasks of the lm-evaluation-harness, and their answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.errors import InputError

if TYPE_CHECKING:
    from peftkit.record import Metric


def add_flags(score: argparse.ArgumentParser) -> None:
    """Add them to the parser of `eval`."""
    score.add_argument(
        "--lm-eval", metavar="TASK,...", help="score on these tasks of lm-eval instead of a recipe's data"
    )
    folder = "folder of task files (*.yaml), their data beside them; default: lm-eval's own tasks, from a hub"
    score.add_argument("--lm-eval-tasks", type=Path, metavar="DIR", help=folder)
    score.add_argument("--lm-eval-limit", type=int, metavar="N", help="only so many examples of each task")
    score.add_argument("--lm-eval-chat", action="store_true", help="ask through the model's chat template")


def is_asked(options: argparse.Namespace) -> bool:
    """Whether tasks are to be scored.

    Raises:
        InputError: a flag that would be ignored.
    """
    if options.lm_eval is not None:
        return True
    for flag in ("tasks", "limit", "chat"):
        if getattr(options, f"lm_eval_{flag}"):
            raise InputError(f"--lm-eval-{flag} would be ignored: name the tasks with --lm-eval TASK.")
    return False


def answer(options: argparse.Namespace) -> dict[str, Metric]:
    """Score the tasks.

    Raises:
        InputError: no task is named, or a recipe, which would be ignored.
    """
    from peftkit.deploy.harness import evaluate_tasks

    tasks = [name.strip() for name in options.lm_eval.split(",") if name.strip()]
    if not tasks:
        raise InputError("--lm-eval names no task.")
    if options.recipe is not None:
        raise InputError(f"--lm-eval brings its own data, and {options.recipe} would be ignored: leave the recipe out.")
    if options.lm_eval_limit is not None and options.lm_eval_limit < 1:
        raise InputError(f"--lm-eval-limit {options.lm_eval_limit} leaves no example. Take 1 or more.")
    return evaluate_tasks(
        options.reference,
        tasks,
        tasks_folder=options.lm_eval_tasks,
        limit=options.lm_eval_limit,
        chat=options.lm_eval_chat,
        out=options.out,
    )
