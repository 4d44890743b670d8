"""How long `peftkit plan` takes, from the command line, in a fresh process: `python benchmarks/plan_speed.py`.

LoRA on a model of 8 and one of 70 billion parameters, from nothing but their config.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peftkit.environment import describe_environment
from peftkit.files import write_json
from peftkit.units import format_bytes, format_seconds

RESULTS = Path(__file__).parent / "results" / "plan-speed"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, int]] = {
    "Llama 3, 8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama 3, 70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Dimensions as published with the models."""
SETTINGS = ("training.max_tokens=2048", "training.micro_batch=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, dimensions in MODELS.items():
            recipe = lay(Path(folder), name, dimensions)
            for method in ("lora", "qlora", "full"):
                timed = [plan(recipe, method) for _ in range(options.repeats)]
                rows.append(row_of(f"{name}, {method}", timed))
                print("  ".join(rows[-1].values()), flush=True)
    document = {
        "note": f"`peftkit plan`, one process a plan, medians of {options.repeats}; memory: the process's high water.",
        "command": f"python benchmarks/plan_speed.py --repeats {options.repeats}",
        "rows": rows,
        "environment": json.loads(json.dumps(describe_environment())),
    }
    write_json(RESULTS / "plan-speed.json", document)


def lay(folder: Path, name: str, dimensions: dict[str, int]) -> Path:
    """A recipe for a model of which only the configuration is there."""
    model = folder / name.replace(" ", "-").replace(",", "")
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA | dimensions))
    content = {"backbone": {"name": str(model), "dtype": "bfloat16"}, "task": {"kind": "chat"}}
    recipe = folder / f"{model.name}.yaml"
    recipe.write_text(json.dumps(content | {"method": {"kind": "lora"}, "data": {"train": "not-here.jsonl"}}))
    return recipe


def plan(recipe: Path, method: str) -> dict[str, Any]:
    """One call of the verb: its answer, wall and CPU seconds, and the most memory that it held."""
    command = [sys.executable, "-m", "peftkit.cli", "plan", str(recipe), f"method={method}", *SETTINGS]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen([*command, "--gpu", "H100 SXM", "--json"], stdout=output)
        _, _, usage = os.wait4(child.pid, 0)  # of this child alone
        child.returncode = 0
        wall = time.perf_counter() - started
        output.seek(0)
        answer: dict[str, Any] = json.load(output)
    return answer | {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "high": 1024 * usage.ru_maxrss}


def row_of(name: str, timed: list[dict[str, Any]]) -> dict[str, str]:
    """The medians of some calls."""
    wall, cpu, high = (statistics.median(one[key] for one in timed) for key in ("wall", "cpu", "high"))
    return {
        "plan": name,
        "needs": format_bytes(timed[0]["needed_bytes"]),
        "wall": format_seconds(wall),
        "CPU": format_seconds(cpu),
        "memory": format_bytes(high),
    }


if __name__ == "__main__":
    main()
