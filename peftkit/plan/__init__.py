"""What a run needs before it runs: memory by term, the moment of the peak, work to be done.

The package is a room of the house and a verb of the API under one name: `peftkit.plan(recipe, gpu="12GiB")`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftkit.plan.planner import Plan
    from peftkit.recipe import Recipe


class _Verb(ModuleType):
    def __call__(self, recipe: Recipe, *, gpu: str | None = None) -> Plan:
        from peftkit.plan.answer import plan_recipe

        return plan_recipe(recipe, gpu=gpu)


sys.modules[__name__].__class__ = _Verb
