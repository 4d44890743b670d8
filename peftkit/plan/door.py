"""How the command line asks the planner: with as little imported on the way as a plan needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from unittest.mock import patch

from peftkit.plan.collection import without_collection

if TYPE_CHECKING:
    from peftkit.plan.answer import Answer
    from peftkit.recipe import Recipe


def answer(question: str, recipe: Recipe, gpu: str | None) -> Answer:
    """The answer to one of `peftkit.plan.answer.QUESTIONS`.

    Raises:
        InputError: an unknown card, a configuration that cannot be had, faulty data, or a method that trains nothing.
    """
    # bitsandbytes has torch compile functions as it is imported, which takes a second
    with patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
        with without_collection():
            from peftkit.plan.answer import QUESTIONS
        return QUESTIONS[question](recipe, gpu)
