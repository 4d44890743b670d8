"""The harness: a suite becomes cells, each cell a run in a process of its own, all of them a report.

The package is a room of the house and a verb of the API under one name: `peftkit.bench(suite, out)` runs the suite.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftkit.bench.executor import Executor
    from peftkit.bench.process import CellResult
    from peftkit.bench.suite import Suite


class _Verb(ModuleType):
    def __call__(
        self, suite: Suite, out: str | Path, *, report_progress: Callable[[str], None], executor: Executor | None = None
    ) -> list[CellResult]:
        from peftkit.bench.executor import run_suite

        return run_suite(suite, Path(out), report_progress=report_progress, executor=executor)


sys.modules[__name__].__class__ = _Verb
