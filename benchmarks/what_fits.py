"""What fits on a card: for each backbone and method, the smallest card that has room for it.

    python benchmarks/what_fits.py [--max-tokens 1024]

Forwards of one example, activations of every layer recomputed: the least that a run can be cut to without losing
anything but time. A card counts with the least memory that cards of its size report, the planner's margin included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from peftkit.backbones.configs import bundled_names
from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.environment import describe_environment
from peftkit.errors import MethodError
from peftkit.files import write_json
from peftkit.plan.cards import CARDS, Card
from peftkit.plan.planner import Planner
from peftkit.recipe import build_recipe
from peftkit.units import format_bytes, format_count

RESULTS = Path(__file__).parent / "results" / "what-fits"
METHODS = ("full", "lora", "qlora")
SIZES = (8, 12, 16, 24, 32, 48, 80)
"""Gigabytes that cards are sold with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=1024)
    options = parser.parse_args()
    rows = []
    for row in fitting_rows(options.max_tokens):
        print("  ".join(row.values()), flush=True)
        rows.append(row)
    write_json(
        RESULTS / f"tokens-{options.max_tokens}.json",
        {
            "note": f"The smallest card for {options.max_tokens} tokens at a time, and what is needed of it.",
            "command": f"python benchmarks/what_fits.py --max-tokens {options.max_tokens}",
            "rows": rows,
            "environment": json.loads(json.dumps(describe_environment())),
        },
    )


def fitting_rows(max_tokens: int) -> Iterator[dict[str, str]]:
    """One row a chat backbone, smallest first."""
    usual = Card("usual", 0, bfloat16=True)
    planners = []
    for name in bundled_names():
        content = {"backbone": {"name": name}, "method": {"kind": "lora"}, "data": {"train": "train.jsonl"}}
        content["training"] = {"max_tokens": max_tokens, "micro_batch": 1, "batch_size": 2, "checkpointing": "all"}
        planner = Planner.open(build_recipe(content), LANGUAGE_HEAD, usual)
        if planner.dims.family == "decoder":
            planners.append((planner, content))
    for planner, content in sorted(planners, key=lambda pair: pair[0].dims.num_params):
        row = {"backbone": f"{content['backbone']['name']} ({format_count(planner.dims.num_params)})"}
        for method in METHODS:
            try:
                needed = planner.plan(build_recipe(content, [f"method={method}"])).needed_bytes
            except MethodError as fault:
                row[method] = str(fault)
                continue
            row[method] = f"{smallest_card(needed)} ({format_bytes(needed)})"
        yield row


def smallest_card(needed_bytes: int) -> str:
    """The size of card of which every model known has this much."""
    for size in SIZES:
        if needed_bytes <= min(card.memory_bytes for card in CARDS if card.advertised_gb == size):
            return f"{size} GB"
    return "more than 80 GB"


if __name__ == "__main__":
    main()
