"""The arithmetic that a training step asks for, and what the machine can do at best.

Model FLOPs count two a multiply-add: every linear layer once forward, once more where a gradient passes to its input,
once more where its weight trains; adapters three times; scores and sums of attention over the pairs of positions that
see each other, three times where a gradient passes; the output layer at labelled tokens alone. Padding, recomputation
and products that nobody needs are no model FLOPs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sides import Example

from peftkit.backbones.dims import Dims
from peftkit.methods.base import Method
from peftkit.methods.full import Full
from peftkit.methods.lora import Lora

if TYPE_CHECKING:
    import torch


def gemm_peak(dims: Dims, dtype: torch.dtype, device: torch.device, *, tokens: int = 2048) -> dict[str, Any]:
    """FLOPs a second of matrix products, medians of seven: two square ones, and the model's own with `tokens` rows."""
    import torch

    own = {(tokens, linear.in_features, linear.out_features) for linear in dims.linears}
    found = {}
    for rows, inner, columns in [(1024,) * 3, (2048,) * 3, *sorted(own)]:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        rates = []
        for _ in range(8):
            begun = time.perf_counter()
            torch.mm(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rates.append(2 * rows * inner * columns / (time.perf_counter() - begun))
        found[f"{rows}x{inner}x{columns}"] = statistics.median(rates[1:])
    return {"best": max(found.values()), "sizes": found}


def model_flops(method: Method, dims: Dims, examples: Sequence[Example]) -> float:
    """FLOPs that one optimizer step's mathematics asks for."""
    adapted = method.matched(dims) if isinstance(method, Lora) else []
    full = isinstance(method, Full)
    lowest = 0 if full else min((linear.layer for linear in adapted if linear.layer is not None), default=dims.layers)
    per_token = 0.0
    for linear in dims.linears:
        passes = linear.layer is None or linear.layer >= lowest
        per_token += 2 * linear.in_features * linear.out_features * (1 + passes + full)
    if isinstance(method, Lora):
        per_token += sum(3 * 2 * method.rank * (linear.in_features + linear.out_features) for linear in adapted)
    seen = 0.5 if dims.family == "decoder" else 1.0
    per_pair = 2 * 2 * dims.heads * dims.head_dim * seen * sum(3 if at >= lowest else 1 for at in range(dims.layers))
    trained_head = full or dims.head.kind == "classification"
    outputs = dims.vocab if dims.head.kind == "language" else dims.head.num_outputs
    total = 0.0
    for example in examples:
        length, labels = len(example["input_ids"]), example["labels"]
        labelled = sum(label != -100 for label in labels) if isinstance(labels, list) else 1
        total += per_token * length + per_pair * length**2
        total += 2 * dims.hidden * outputs * (2 + trained_head) * labelled
    return total
