"""Made-up records for the tests of tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.record import Memory, Metric, Parameters, RunRecord, Status, Throughput
from peftkit.report.rows import CellRow
from peftkit.units import MIB


def record(seed: int = 0, *, status: Status = "ok", error: str | None = None, **parts: Any) -> RunRecord:
    return RunRecord(
        peftkit_version="0.1.0",
        recipe={"method": {"kind": "lora", "rank": 8}, "evaluation": {"metric": "auto"}},
        recipe_digest="0123456789abcdef",
        label="lora",
        seed=seed,
        status=status,
        error=error,
        environment={"python": "3.11", "packages": {"torch": "2.13"}},
        **parts,
    )


def accuracy(value: float, *, n: int = 400, chance: float | None = 0.5) -> dict[str, Metric]:
    return {"accuracy": Metric(value=value, low=value - 0.02, high=value + 0.03, n=n, chance=chance)}


def trained(value: float, seed: int = 0, *, memory_mib: int = 100, tokens_per_second: float = 5000.0) -> RunRecord:
    return record(
        seed,
        metrics=accuracy(value),
        parameters=Parameters(total=1000, trainable=1500, artifact_bytes=6000),
        memory=Memory(kind="rss", baseline_bytes=300 * MIB, peak_bytes=(300 + memory_mib) * MIB),
        throughput=Throughput(
            samples=10,
            tokens=200,
            loss_tokens=10,
            padding_fraction=0.25,
            train_seconds=75.0,
            cpu_seconds=140.0,
            tokens_per_second=tokens_per_second,
            step_seconds_p50=0.1,
            step_seconds_p90=0.2,
        ),
    )


def row(variant: str, found: RunRecord | None, seed: int = 0) -> CellRow:
    return CellRow(variant, seed, Path("cells") / f"{variant}-seed{seed}", found)
