"""How large the page of a big benchmark is, and how long a browser takes to show it.

    python benchmarks/report_page.py [--methods 100] [--seeds 5] [--examples 1000] [--opens 5] [--keep DIR] [--json]

Cells are made up: scores, curves and answers of the shapes that runs write. Needs Chromium, its driver and selenium.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.files import write_json_lines
from peftkit.recipe import Recipe, build_recipe
from peftkit.record import (
    PREDICTIONS_NAME,
    Loss,
    Memory,
    Metric,
    Parameters,
    RunRecord,
    Status,
    Throughput,
    bare_record,
)
from peftkit.report.comparison import Difference, compare_variants
from peftkit.report.page import write_page
from peftkit.report.rows import CellRow, summarise
from peftkit.units import MIB

CHANCE = 0.504
STEPS = 750
LOG_EVERY = 10
ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux-6.1-x86_64",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "numpy": "2.4.6"},
    "device": "cuda",
    "device_name": "a card that does not exist",
    "device_memory_bytes": 24 * 2**30,
    "threads": 8,
    "commit": "0123456789ab",
}


@dataclass(frozen=True, slots=True)
class Character:
    """What a made-up method is like: accuracy, memory over baseline, speed, weights trained, bytes deployed."""

    method: dict[str, Any]
    accuracy: float
    memory_mib: int
    tokens_per_second: float
    trainable: int
    artifact_bytes: int


TEN = {
    "full": Character({"kind": "full"}, 0.869, 964, 660, 22_713_986, 91_581_173),
    "lora": Character({"kind": "lora"}, 0.866, 412, 1010, 676_610, 3_435_594),
    "lora, rank=8": Character({"kind": "lora", "rank": 8}, 0.858, 385, 1060, 170_114, 1_398_102),
    "dora": Character({"kind": "lora", "dora": True}, 0.867, 521, 640, 690_050, 3_489_310),
    "qlora": Character({"kind": "lora", "alpha": 64}, 0.862, 318, 720, 676_610, 3_435_600),
    "prefix": Character({"kind": "prefix"}, 0.792, 298, 905, 92_930, 1_090_057),
    "prompt": Character({"kind": "prompt"}, 0.741, 507, 874, 8_450, 752_190),
    "head": Character({"kind": "head"}, 0.703, 75, 1969, 770, 91_581_174),
    "zero-shot": Character({"kind": "zero-shot"}, 0.626, 0, 0, 0, 0),
}


def many_methods(count: int) -> dict[str, Character]:
    """So many points of a grid over ranks and rates."""
    rng = random.Random(count)
    found = {}
    for i in range(count):
        rank, rate = 2 ** (1 + i % 10), 1e-4 * (1 + i // 10)
        found[f"lora, rank={rank}, learning_rate={rate:g}"] = Character(
            {"kind": "lora", "rank": rank},
            0.8 + 0.06 * rng.random() + 0.002 * math.log2(rank),
            int(300 + 0.2 * rank + 60 * rng.random()),
            1000 - 0.3 * rank + 90 * rng.random(),
            21_000 * rank,
            85_000 * rank,
        )
    return found


def make_cells(
    folder: Path, methods: dict[str, Character], *, seeds: int, examples: int, failures: bool = True
) -> list[CellRow]:
    """The rows of a benchmark that never ran, with the files that the page reads in each cell's folder."""
    rng = random.Random(7)
    hardness = [rng.random() for _ in range(examples)]
    rows = []
    for place, (variant, character) in enumerate(methods.items()):
        for seed in range(seeds if character.trainable else 1):
            recipe = _recipe(character, seed, 1e-4 * (1 + place // 10))
            cell = folder / "cells" / f"{variant.replace(', ', '-')}-seed{seed}-{recipe.digest[:8]}"
            record = _record(cell, recipe, character, random.Random(1000 * place + seed), hardness)
            rows.append(CellRow(variant, seed, cell, record))
    return rows + (_failures(folder) if failures else [])


def compare(rows: Sequence[CellRow]) -> list[Difference]:
    """Every variant against the one that reports choose, and against the best one."""
    best = summarise(rows)[0].variant
    found = compare_variants(rows)
    return found if found and found[0].reference == best else [*found, *compare_variants(rows, best)]


def _recipe(character: Character, seed: int, rate: float) -> Recipe:
    content: dict[str, Any] = {
        "backbone": {"name": "minilm-l6"},
        "method": character.method,
        "task": {"kind": "classify", "labels": ["negative", "positive"]},
        "data": dict.fromkeys(("train", "validation", "test"), "builtin:movie-sentiment"),
        "seed": seed,
    }
    if character.trainable:
        content["training"] = {"learning_rate": rate, "batch_size": 32, "max_tokens": 128}
    return build_recipe(content)


def _record(
    folder: Path, recipe: Recipe, character: Character, rng: random.Random, hardness: Sequence[float]
) -> RunRecord:
    folder.mkdir(parents=True)
    accuracy = character.accuracy + (rng.gauss(0, 0.004) if character.trainable else 0)
    answers = [_answer(row, accuracy, hard, rng) for row, hard in enumerate(hardness)]
    write_json_lines(folder / PREDICTIONS_NAME, answers)
    metrics = {
        name: Metric(value=value, low=value - 0.02, high=value + 0.02, n=len(answers), chance=CHANCE)
        for name, value in _scores(answers).items()
    }
    record = bare_record(recipe, "ok", None, environment=ENVIRONMENT)
    update: dict[str, Any] = {"metrics": metrics, "parameters": Parameters(total=22_713_986, trainable=0)}
    if character.trainable:
        update |= _trained(folder, character, accuracy, rng)
    return record.model_copy(update=update)


def _scores(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy and macro F1 of two labels."""
    pairs = Counter((answer["label"], answer["prediction"]) for answer in answers)
    right = [pairs[label, label] for label in (0, 1)]
    wrong = pairs[0, 1] + pairs[1, 0]
    return {"accuracy": sum(right) / len(answers), "macro_f1": statistics.fmean(2 * r / (2 * r + wrong) for r in right)}


def _answer(row: int, accuracy: float, hard: float, rng: random.Random) -> dict[str, Any]:
    """Mostly the same examples are hard for every method; the rest is noise of its own."""
    label = row * 7919 % 2
    margin = accuracy - (hard if rng.random() < 0.88 else rng.random())  # uniform: right as often as `accuracy` says
    sure = 1 / (1 + math.exp(-6 * abs(margin) - rng.random()))
    prediction = label if margin > 0 else 1 - label
    scores = [round(sure, 6) if index == prediction else round(1 - sure, 6) for index in (0, 1)]
    return {"row": row, "label": label, "prediction": prediction, "scores": scores, "loss": -math.log(scores[label])}


def _trained(folder: Path, character: Character, accuracy: float, rng: random.Random) -> dict[str, Any]:
    epochs_per_step = 3 / STEPS
    steps = [1, *range(LOG_EVERY, STEPS + 1, LOG_EVERY)]
    losses = [0.70 - (accuracy - 0.45) * (1 - math.exp(-4 * s / STEPS)) + rng.gauss(0, 0.025) for s in steps]
    lines = zip(steps, losses, strict=True)
    write_json_lines(
        folder / "log.jsonl", ({"step": s, "epoch": s * epochs_per_step, "loss": max(0.02, x)} for s, x in lines)
    )
    tensors = round(character.memory_mib * MIB * 0.93)
    history = [
        {"step": s, "epoch": s * epochs_per_step, "loss": 0.36 + gap, "accuracy": accuracy - gap + rng.gauss(0, 0.003)}
        for s, gap in ((250, 0.03), (500, 0.01), (750, 0.002))
    ]
    tokens = 650_358
    return {
        "history": history,
        "loss": Loss(first=losses[0], last=losses[-1], mean=statistics.fmean(losses), validation=history[-1]["loss"]),
        "parameters": Parameters(
            total=22_713_986, trainable=character.trainable, artifact_bytes=character.artifact_bytes
        ),
        "memory": Memory(
            kind="cuda-reserved",
            baseline_bytes=91 * MIB,
            peak_bytes=(91 + character.memory_mib) * MIB + rng.randrange(8) * MIB,
            tensor_peak_bytes=tensors,
            predicted_tensor_peak_bytes=round(tensors * rng.uniform(0.98, 1.06)),
        ),
        "throughput": Throughput(
            samples=24_162,
            tokens=tokens,
            loss_tokens=24_162,
            padding_fraction=0.0,
            train_seconds=tokens / character.tokens_per_second,
            cpu_seconds=tokens / character.tokens_per_second,
            tokens_per_second=character.tokens_per_second * rng.uniform(0.97, 1.03),
            step_seconds_p50=0.9,
            step_seconds_p90=1.2,
        ),
        "wall_seconds": tokens / character.tokens_per_second + 60,
    }


def _failures(folder: Path) -> list[CellRow]:
    """One run out of memory, one that diverged, one that was killed and one that never ran."""
    told: dict[Status, str] = {
        "oom": "this run needs 27.4 GiB and the card has 24.0 (activations 14.1). Try training.batch_size=6.",
        "diverged": "the loss is not finite at step 212 (gradient norm 3.1e+04). Lower training.learning_rate.",
        "killed": "the process was killed by SIGKILL; if nobody sent it, the machine ran out of memory",
    }
    rows = []
    for seed, (status, reason) in enumerate(told.items()):
        recipe = _recipe(Character({"kind": "lora", "rank": 256}, 0, 1, 1, 1, 1), seed, 1e-2)
        record = bare_record(recipe, status, reason, environment=ENVIRONMENT)
        rows.append(CellRow("lora, rank=256", seed, folder / "cells" / f"lora-rank256-seed{seed}", record))
    return [*rows, CellRow("lora, rank=256", 3, folder / "cells" / "lora-rank256-seed3", None)]


def open_times(page: Path, *, opens: int) -> list[dict[str, float]]:
    """Milliseconds from navigation to the parsed document and to the drawn page, each in a fresh browser."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = []
    for _ in range(opens):
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or "chromedriver"))
        try:
            browser.get(page.absolute().as_uri())
            deadline = time.monotonic() + 60
            while (ready := browser.execute_script("return document.documentElement.dataset.ready")) is None:
                if time.monotonic() > deadline:
                    raise TimeoutError("the page was not ready after a minute")
            loaded = browser.execute_script("return performance.getEntriesByType('navigation')[0].domInteractive")
            found.append({"parsed_ms": float(loaded), "ready_ms": float(ready)})
        finally:
            browser.quit()
    return found


def main(arguments: list[str]) -> int:
    """Write a page of made-up cells, open it, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--opens", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for the page; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        rows = make_cells(Path(made), many_methods(options.methods), seeds=options.seeds, examples=options.examples)
        differences = compare(rows)
        started = time.perf_counter()
        page = write_page(options.keep or Path(made), "a big benchmark", rows, differences)
        seconds = time.perf_counter() - started
        times = open_times(page, opens=options.opens)
        found = {
            "cells": len(rows),
            "examples": options.examples,
            "page_bytes": page.stat().st_size,
            "write_seconds": round(seconds, 2),
            "ready_ms_median": statistics.median(each["ready_ms"] for each in times),
            "ready_ms_most": max(each["ready_ms"] for each in times),
            "opens": times,
        }
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['cells']} cells x {options.examples} examples: {found['page_bytes'] / 1e6:.2f} MB, written in "
            f"{seconds:.1f} s, drawn {found['ready_ms_median']:.0f} ms after opening (most of {options.opens}: "
            f"{found['ready_ms_most']:.0f} ms)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
