"""The one loop: steps, optimizer, meter, checkpoints, guards. It knows neither methods nor tasks by name.

The package is a room of the house and a verb of the API under one name: `peftkit.train(recipe, out)` calls `run.train`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftkit.recipe import Recipe
    from peftkit.record import RunRecord
    from peftkit.train.loop import Observer


class _Verb(ModuleType):
    def __call__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        resume: bool = False,
        planned: bool = True,
        observer: Observer | None = None,
    ) -> RunRecord:
        from peftkit.run import train

        return train(recipe, out, resume=resume, planned=planned, observer=observer)


sys.modules[__name__].__class__ = _Verb
