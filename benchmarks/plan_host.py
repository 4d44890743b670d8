"""How close the planner comes to runs on this host: `python benchmarks/plan_host.py [--record] [ONLY ...]`.

Every method on a real encoder and a real chat model trains for a few steps, each in a process of its own. Held against
its plan is what tensors held at once, and what the whole process did. `--record` keeps the table for
`benchmarks/publish.py`, and the largest underestimate as the planner's margin on a host.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peftkit.environment import describe_environment
from peftkit.files import write_json
from peftkit.plan.planner import record_margin
from peftkit.record import Memory, read_record
from peftkit.units import format_bytes

TABLE = Path(__file__).parent / "results" / "plan-accuracy" / "host.json"
CHAT, CLASSIFY = "smollm2-135m", "minilm-l6"
SETTINGS = {
    CHAT: ("task=chat", "data.train=builtin:chatterbot-en", "training.max_tokens=256", "training.batch_size=8"),
    CLASSIFY: (
        "task=classify",
        "data.train=builtin:movie-sentiment",
        "training.max_tokens=128",
        "training.batch_size=32",
        "training.dropout=0",
    ),
}
"""Without dropout, whose masks numpy draws on a host: a plan counts them, and who watches tensors does not see them."""
METHODS = {CHAT: ("full", "lora", "qlora", "prefix", "prompt")}
METHODS[CLASSIFY] = (*METHODS[CHAT], "head")
COMMON = ("data.limit.train=256", "training.max_steps=4", "evaluation.every=never")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="such as 'minilm-l6 lora'; the other rows of the table stay")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    rows: dict[str, dict[str, str]] = {}
    if options.only:
        rows = {row["run"]: row for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]}
    for backbone, methods in METHODS.items():
        for method in methods:
            name = f"{backbone} {method}"
            if not options.only or name in options.only:
                rows[name] = {"run": name} | shown(run(backbone, f"method={method}"))
                print("  ".join(rows[name].values()), flush=True)
    if options.record:
        record(list(rows.values()))


def record(rows: list[dict[str, str]]) -> None:
    """Write the margin into the package, and the rows where the results lie."""
    record_margin("cpu", [float(row["error of it"].rstrip("%")) / 100 for row in rows])
    document = {
        "note": "Real runs on a host: what tensors held at once and what the process did, and the planner's error.",
        "command": "python benchmarks/plan_host.py --record",
        "rows": rows,
        "environment": describe_environment(),
    }
    write_json(TABLE, document)


def run(backbone: str, *overrides: str) -> Memory:
    """What a run of a few steps recorded about memory."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, out = Path(folder) / "recipe.yaml", Path(folder) / "run"
        recipe.write_text(f"backbone: {backbone}\nmethod: lora\ndata: {{train: none.jsonl}}\n", encoding="utf-8")
        command = [sys.executable, "-m", "peftkit.cli", "train", str(recipe), "--out", str(out), "--json"]
        subprocess.run([*command, *SETTINGS[backbone], *COMMON, *overrides], check=True, stdout=subprocess.DEVNULL)
        memory = read_record(out).memory
    assert memory is not None, "a run that trains measures memory"
    return memory


def shown(memory: Memory) -> dict[str, str]:
    """A row of the table."""
    return {
        "tensors": format_bytes(known(memory.tensor_peak_bytes)),
        "error": f"{error(memory.predicted_tensor_peak_bytes, memory.tensor_peak_bytes):+.2%}",
        "process": format_bytes(known(memory.peak_bytes)),
        "error of it": f"{error(memory.predicted_peak_bytes, memory.peak_bytes):+.2%}",
    }


def error(predicted: int | None, measured: int | None) -> float:
    """As a fraction of what was measured."""
    return known(predicted) / known(measured) - 1


def known(value: Any) -> int:
    """A number that every planned run records."""
    assert isinstance(value, int)
    return value


if __name__ == "__main__":
    main()
