"""Which attention is faster at which length: `python benchmarks/attention_kinds.py`.

Forward and backward of one layer's attention over packed examples of one length, about as many tokens each time, by
batched matrix products and by torch's fused kind, in turns in one process. `LONGEST_PRODUCT` of `kernels/attention.py`
lies where the ratio crosses one; the head counts are those of SmolLM2-135M and of MiniLM-L6.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from peftkit.environment import describe_environment
from peftkit.files import write_json
from peftkit.kernels import attention
from peftkit.kernels.segments import Segments

RESULTS = Path(__file__).parent / "results" / "attention-kinds"
TOKENS = 2048
LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768)
SHAPES = {"decoder": (9, 3, 64, True), "encoder": (12, 12, 32, False)}
"""Query heads, key heads, features of a head, and whether attention is causal."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each kind; medians are shown")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args(arguments)
    rows: list[dict[str, str]] = []
    for name, shape in SHAPES.items():
        for length in LENGTHS:
            with patch.dict(attention.LONGEST_PRODUCT, dict.fromkeys(attention.LONGEST_PRODUCT, sys.maxsize)):
                times = compare(length, shape, getattr(torch, options.dtype), options.rounds)
            rows.append(row_of(f"{name}, {length} tokens", times))
            print("  ".join(rows[-1].values()), flush=True)
    document = {
        "note": f"One layer's attention, forward and backward, over {TOKENS:,} tokens or so in {options.dtype}: "
        f"medians of {options.rounds} turns. Both kinds give the same numbers but for rounding.",
        "command": f"python benchmarks/attention_kinds.py --rounds {options.rounds} --dtype {options.dtype}",
        "rows": rows,
        "environment": describe_environment(),
    }
    write_json(RESULTS / f"{options.dtype}.json", document)
    return 0


def compare(
    length: int, shape: tuple[int, int, int, bool], dtype: torch.dtype, rounds: int
) -> dict[str, tuple[list[float], Tensor]]:
    """Seconds of each turn, and the outputs, by kind."""
    heads, key_heads, features, causal = shape
    segments = Segments.of([length] * max(1, TOKENS // length))
    tokens = sum(segments.lengths)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, count, features).to(dtype) for count in (heads, key_heads, key_heads))
    states = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
    gradient = torch.randn(1, tokens, heads, features).to(dtype)
    module = SimpleNamespace(is_causal=causal, layer_idx=0)

    def turn(products: bool) -> Tensor:
        out, _ = attention.attend(module, *states, None, segments=segments, scaling=features**-0.5, products=products)
        torch.autograd.grad(out, states, gradient)
        return out.detach()

    kinds: dict[str, Callable[[], Tensor]] = {"products": lambda: turn(True), "fused": lambda: turn(False)}
    found: dict[str, tuple[list[float], Tensor]] = {kind: ([], run()) for kind, run in kinds.items()}
    for _ in range(rounds):
        for kind, run in kinds.items():
            started = time.perf_counter()
            run()
            found[kind][0].append(time.perf_counter() - started)
    return found


def row_of(name: str, found: dict[str, tuple[list[float], Tensor]]) -> dict[str, str]:
    """A row of the table."""
    medians = {kind: statistics.median(seconds) for kind, (seconds, _) in found.items()}
    gap: Any = (found["products"][1].float() - found["fused"][1].float()).abs().max()
    return {
        "examples of": name,
        **{kind: f"{1000 * seconds:.1f} ms" for kind, seconds in medians.items()},
        "fused over products": f"{medians['fused'] / medians['products']:.2f}",
        "largest difference": f"{float(gap):.1e}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
