"""A run's folder: what is in it by which name, and whose it is; a run never writes over another's."""

from __future__ import annotations

from pathlib import Path

from peftkit.errors import InputError, OutputError
from peftkit.files import write_text
from peftkit.recipe import Recipe, load_recipe
from peftkit.record import RECORD_NAME, RunRecord, read_record

RECIPE_NAME = "recipe.yaml"
HEAD_NAME = "head.json"
"""Beside an artifact: the head it was trained with."""
BASE_NAME = "base.json"
"""Beside an artifact: the identity of the backbone it belongs to."""


def finished_record(recipe: Recipe, out: Path) -> RunRecord | None:
    """The record of the finished run of this very recipe in `out`; None when there is none."""
    known = out / RECIPE_NAME
    if not (known.is_file() and (out / RECORD_NAME).is_file()) or load_recipe(known).digest != recipe.digest:
        return None
    record = read_record(out)
    return record if record.status == "ok" else None


def claim_folder(recipe: Recipe, out: Path, *, resume: bool) -> RunRecord | None:
    """Make `out` this recipe's folder; the record if the run in it is finished.

    Raises:
        OutputError: it holds something else, or an unfinished run that was not asked to resume, or cannot be written.
        InputError: `resume` with a recipe that changed, naming the keys.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file. Choose a folder with --out.")
    known = out / RECIPE_NAME
    if known.is_file():
        before = load_recipe(known)
        if before.digest != recipe.digest:
            changed = "; ".join(before.differing_keys(recipe))
            if resume:
                raise InputError(f"{out} cannot be resumed with another recipe. It differs in: {changed}.")
            raise OutputError(
                f"{out} already holds another run ({before.label}). It differs in: {changed}. Choose another --out."
            )
        finished = finished_record(recipe, out)
        if finished is not None:
            return finished
        if not resume:
            raise OutputError(
                f"{out} holds an unfinished run of this recipe. Add --resume to go on, or choose another --out."
            )
        return None
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} is not empty and holds no run. Choose another --out.")
    write_text(known, recipe.to_yaml())
    return None


def release_folder(out: Path) -> None:
    """Take back a folder in which nothing has happened yet."""
    if out.is_dir() and {path.name for path in out.iterdir()} <= {RECIPE_NAME}:
        (out / RECIPE_NAME).unlink(missing_ok=True)
        out.rmdir()
