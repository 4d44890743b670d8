"""What the harness itself costs and how far its figures repeat: `python benchmarks/bench_overhead.py`.

One cell of about a minute on a real backbone, run a few times in one call, each time anew, on an idle machine. Overhead
is what of a cell's wall time, from the end of the one before to its own, is neither training nor scoring. The first
cell also pays for the imports that the others are forked with, and its overhead is told apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from peftkit.bench.executor import run_cells
from peftkit.bench.process import Conditions
from peftkit.bench.suite import Cell
from peftkit.environment import describe_environment
from peftkit.files import write_json
from peftkit.recipe import build_recipe
from peftkit.record import RunRecord
from peftkit.units import format_bytes, format_seconds

RESULTS = Path(__file__).parent / "results" / "overhead"
OVERHEAD, MEMORY, THROUGHPUT = 0.05, 0.02, 0.10
"""What is promised: of a cell's wall time; between runs of one cell."""


@dataclass(frozen=True, slots=True)
class Run:
    """One cell as the harness ran it, and the seconds that this took."""

    record: RunRecord
    seconds: float

    @property
    def overhead(self) -> float:
        """Seconds that are neither training nor scoring."""
        return self.seconds - self.record.phases["train"] - self.record.phases["score"]


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="at least 2")
    parser.add_argument("--steps", type=int, default=115, help="so many that a cell takes about a minute")
    options = parser.parse_args(arguments)
    runs = measure(steps=options.steps, repeats=options.repeats)
    rows = [row_of(f"run {number}", run) for number, run in enumerate(runs, start=1)]
    memory = spread([run.record.memory.peak_bytes or 0 for run in runs if run.record.memory is not None])
    speed = spread([run.record.throughput.tokens_per_second for run in runs if run.record.throughput is not None])
    same = len({json.dumps(run.record.model_dump(mode="json")["metrics"], sort_keys=True) for run in runs}) == 1
    overhead = max(run.overhead / run.seconds for run in runs[1:])
    rows.append(
        {
            "run": "largest but for the first, or spread",
            "cell": "",
            "training and scoring": "",
            "overhead": f"{overhead:.1%}",
            "peak memory": f"{memory:.1%}",
            "tokens/s": f"{speed:.1%}",
            "metrics": "the same" if same else "differ",
        }
    )
    document = {
        "note": f"One cell of {options.steps} steps of LoRA on MiniLM-L6, {options.repeats} times.",
        "command": f"python benchmarks/bench_overhead.py --repeats {options.repeats} --steps {options.steps}",
        "rows": rows,
        "environment": json.loads(json.dumps(describe_environment())),
    }
    write_json(RESULTS / "overhead.json", document)
    kept = overhead <= OVERHEAD and memory <= MEMORY and speed <= THROUGHPUT and same
    return 0 if kept else 1


def measure(*, steps: int, repeats: int) -> list[Run]:
    """The same cell in folders of its own, one after another in one call of the harness."""
    content = build_recipe(recipe(steps))
    cells = [Cell(f"run-{number}", f"run {number}", content) for number in range(1, repeats + 1)]
    moments = [time.perf_counter()]

    def say(text: str) -> None:
        if text.startswith("["):
            moments.append(time.perf_counter())
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder:
        results = run_cells(cells, Path(folder), conditions=Conditions(inference=False), say=say)
    for result in results:
        if result.status != "ok":
            raise SystemExit(f"the cell ended as {result.status}: {result.record.error}")
    runs = [Run(result.record, end - start) for result, (start, end) in zip(results, pairwise(moments), strict=True)]
    for cell, run in zip(cells, runs, strict=True):
        phases = {name: format_seconds(seconds) for name, seconds in run.record.phases.items()}
        print("  ".join(row_of(cell.variant, run).values()), phases, flush=True)
    return runs


def recipe(steps: int) -> dict[str, Any]:
    """LoRA on film reviews, scored once at the end."""
    source = "builtin:movie-sentiment"
    return {
        "backbone": "minilm-l6",
        "method": {"kind": "lora"},
        "task": "classify",
        "data": {"train": source, "validation": source, "test": source},
        "training": {"max_steps": steps, "batch_size": 32, "max_tokens": 128, "learning_rate": 1.5e-3},
        "evaluation": {"every": "never"},
    }


def row_of(name: str, run: Run) -> dict[str, str]:
    """One line of the table."""
    memory, throughput = run.record.memory, run.record.throughput
    assert memory is not None
    assert throughput is not None
    return {
        "run": name,
        "cell": format_seconds(run.seconds),
        "training and scoring": format_seconds(run.seconds - run.overhead),
        "overhead": f"{format_seconds(run.overhead)} ({run.overhead / run.seconds:.1%})",
        "peak memory": format_bytes(memory.peak_bytes or 0),
        "tokens/s": f"{throughput.tokens_per_second:.0f}",
        "metrics": ", ".join(f"{name} {metric.value:.4f}" for name, metric in list(run.record.metrics.items())[:1]),
    }


def spread(values: list[float]) -> float:
    """Largest over smallest, less one."""
    return max(values) / min(values) - 1


if __name__ == "__main__":
    sys.exit(main())
