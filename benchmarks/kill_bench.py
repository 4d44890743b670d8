"""What `kill -9` does to a benchmark: `python benchmarks/kill_bench.py [--kills 20]`.

Runs a suite undisturbed, then once more in another folder, where at random moments the harness, or a cell that it is
running, is killed by SIGKILL and called again, now and then with a second one beside it on the same folder. In the end
both folders must hold the same: metrics, losses, predictions, weights. No cell that had finished may have been run
again, no file may be torn or left half written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from peftkit.files import STAGING_PREFIX, write_json
from peftkit.recipe import dump_yaml
from peftkit.units import format_seconds

RESULTS = Path(__file__).parent / "results" / "kill"
PATIENCE = 600.0
"""Seconds after which something that must end is taken to hang."""
SUITE: dict[str, Any] = {
    "name": "kill",
    "recipe": {
        "backbone": "minilm-l6",
        "method": {"kind": "lora", "rank": 4},
        "task": "classify",
        "data": {
            **dict.fromkeys(("train", "validation", "test"), "builtin:movie-sentiment"),
            "limit": {"train": 64, "validation": 16, "test": 32},
        },
        "training": {"epochs": 2, "batch_size": 8, "max_tokens": 32, "checkpoint_every": 1},
    },
    "variants": {"lora": {}, "head": {"method": "head"}},
    "seeds": [0, 1],
    "inference": False,
}
"""Checkpoints after every step, an evaluation in between, the best weights restored: all that a kill can hit."""


class Harness:
    """`peftkit bench` in a process of its own."""

    def __init__(self, suite: Path, out: Path) -> None:
        command = [sys.executable, "-m", "peftkit.cli", "bench", str(suite), "--out", str(out), "--json"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, process_group=0)

    def cells(self) -> list[psutil.Process]:
        """The processes that run cells; the fork server that they come from is none."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
            return [child for child in below if is_cell(child)]
        except psutil.NoSuchProcess:
            return []

    def watch(self, seconds: float) -> None:
        """Wait so long, or until it ends."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def watch_for_cell(self) -> bool:
        """Wait until it runs a cell. False when it has ended before."""
        while self.process.poll() is None:
            if self.cells():
                return True
            self.watch(0.02)
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


def main(arguments: list[str] | None = None) -> int:
    """Run, kill, compare; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kill-bench-") as folder:
        found = disturb(SUITE, Path(folder), kills=options.kills, seed=options.seed, say=print)
    for fault in found["faults"]:
        print(fault, file=sys.stderr)
    if not found["faults"]:
        write_json(RESULTS / "kill.json", document(found, options.kills, options.seed))
    return 1 if found["faults"] else 0


def disturb(
    suite: dict[str, Any], folder: Path, *, kills: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the suite with and without kills; what was killed, how long both took, and the `faults` that were found."""
    path, calm, rough = folder / "suite.yaml", folder / "calm", folder / "rough"
    path.write_text(dump_yaml(suite), encoding="utf-8")
    started = time.monotonic()
    if Harness(path, calm).process.wait(PATIENCE) != 0:
        return {"faults": ["the undisturbed run failed"]}
    calm_seconds = time.monotonic() - started
    say(f"undisturbed: {format_seconds(calm_seconds)}")
    draw = random.Random(seed)
    killed = {"harness": 0, "cell": 0}
    kept: dict[str, str] = {}
    faults: list[str] = []
    harness, second = Harness(path, rough), None
    started = time.monotonic()
    while sum(killed.values()) < kills:
        victim, share = draw.choice(("harness", "cell")), calm_seconds / len(expected(calm))
        harness.watch(draw.uniform(0.0, 1.5 * share))
        if victim == "cell" and harness.watch_for_cell():
            harness.watch(draw.uniform(0.0, share / 3))
        if harness.process.poll() == 0:  # it ended well between two kills: compare, and begin anew
            faults += differences(calm, rough)
            rough, kept = folder / f"rough-{sum(killed.values())}", {}
        if harness.process.poll() is not None:  # else a cell of it was killed, and the next call runs that again
            harness = Harness(path, rough)
            continue
        cells = harness.cells()
        if victim == "harness":
            harness.kill()
        elif cells:
            cells[0].send_signal(signal.SIGKILL)
        else:
            continue
        killed[victim] += 1
        say(f"{sum(killed.values())}. {victim}, after {format_seconds(time.monotonic() - started)}")
        faults += _changed(rough, kept)
        if victim == "harness":
            harness = Harness(path, rough)
            if draw.random() < 0.25 and second is None:
                second = Harness(path, rough)
            elif second is not None:
                second.kill()
                second = None
    if second is not None:
        second.process.wait(PATIENCE)
    harness.process.wait(PATIENCE)
    if Harness(path, rough).process.wait(PATIENCE) != 0:
        faults.append("the last call did not end well")
    faults += _changed(rough, kept) + differences(calm, rough)
    return {
        "faults": faults,
        "folder": rough,
        "killed": killed,
        "calm_seconds": calm_seconds,
        "rough_seconds": time.monotonic() - started,
        "cells": len(expected(calm)),
    }


def expected(out: Path) -> list[str]:
    """Names of the suite's cells."""
    return [cell["name"] for cell in json.loads((out / "cells.json").read_text(encoding="utf-8"))["cells"]]


def differences(calm: Path, rough: Path) -> list[str]:
    """What is not as in the undisturbed run, or torn, or left over."""
    faults = [f"left over: {path}" for path in (rough / "cells").rglob(f"{STAGING_PREFIX}*")]
    for name in expected(calm):
        ours, theirs = outcome(calm / "cells" / name), outcome(rough / "cells" / name)
        faults += [f"{name}: {key} differs" for key in ours if ours[key] != theirs.get(key)]
        log = (rough / "cells" / name / "cell.log").read_text(encoding="utf-8", errors="replace").splitlines()
        if log.count("ok") > 1:
            faults.append(f"{name}: was run to its end {log.count('ok')} times")
    return faults


def outcome(folder: Path) -> dict[str, Any]:
    """What a cell found, without what time and memory it took; every file of it is read whole."""
    import torch
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        weights = sorted(path for path in folder.glob("*/*.safetensors") if "checkpoints" not in path.parts)
        tensors = {
            f"{path.name} {name}": hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
            for path in weights
            for name, tensor in load_file(path).items()
        }
    except (OSError, ValueError) as fault:
        return {"files": str(fault)}
    history = [{k: v for k, v in row.items() if k != "train_seconds"} for row in record.get("history", [])]
    log = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    samples = record.get("throughput", {}).get("samples")
    return {key: record.get(key) for key in ("status", "metrics", "validation_metrics", "loss", "guards", "recipe")} | {
        "history": history,
        "log": log,
        "samples": samples,
        "weights": tensors,
        "predictions": (folder / "predictions.jsonl").read_text(encoding="utf-8"),
    }


def _changed(rough: Path, kept: dict[str, str]) -> list[str]:
    """Finished cells whose record is another than at an earlier look; those that are new are added to `kept`."""
    faults = []
    for path in sorted((rough / "cells").glob("*/record.json")):
        text = path.read_text(encoding="utf-8")
        if json.loads(text)["status"] == "ok" and kept.setdefault(path.parent.name, text) != text:
            faults.append(f"{path.parent.name}: was run again after it had finished")
    return faults


def is_cell(process: psutil.Process) -> bool:
    """Whether a process runs a cell, forked or started anew."""
    try:
        words = process.cmdline()
        forked = "peftkit.bench.forkserver" in words and "peftkit.bench.forkserver" in process.parent().cmdline()
    except (psutil.NoSuchProcess, AttributeError):
        return False
    return forked or "peftkit.bench.cell" in words


def document(found: dict[str, Any], kills: int, seed: int) -> dict[str, Any]:
    """The result as `publish.py` reads it."""
    from peftkit.environment import describe_environment

    row = {
        "suite": f"{found['cells']} cells of two methods and two seeds",
        "harness killed": str(found["killed"]["harness"]),
        "cell killed": str(found["killed"]["cell"]),
        "undisturbed": format_seconds(found["calm_seconds"]),
        "disturbed": format_seconds(found["rough_seconds"]),
        "differences": "none",
    }
    return {
        "note": "SIGKILL at random moments, to the harness or to the cell that it runs; then the same call again. "
        "Metrics, losses, predictions and weights are compared with an undisturbed run, bit by bit.",
        "command": f"python benchmarks/kill_bench.py --kills {kills} --seed {seed}",
        "rows": [row],
        "environment": json.loads(json.dumps(describe_environment())),
    }


if __name__ == "__main__":
    sys.exit(main())
