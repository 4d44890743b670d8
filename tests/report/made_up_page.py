"""Made-up documents for the tests of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.report.comparison import Difference, Outcome
from peftkit.report.page_data import page_document
from peftkit.report.rows import CellRow

HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script><!--\'"&amp;{{DATA}}'


def small_document(rows: Sequence[CellRow], out: Path = Path("nowhere"), *, name: str = "small") -> dict[str, Any]:
    return page_document(out, name, rows, [])


def difference(variant: str, reference: str, value: float, outcome: Outcome, verdict: str) -> Difference:
    return Difference(
        variant=variant,
        reference=reference,
        metric="accuracy",
        value=value,
        low=value - 0.03,
        high=value + 0.03,
        p_value=0.5,
        adjusted_p=0.5,
        num_examples=400,
        num_seeds=1,
        detectable=0.04,
        verdict=verdict,
        outcome=outcome,
        basis="examples",
        reference_seeds=1,
        paired_seeds=True,
    )
