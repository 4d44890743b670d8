"""Which part of a training step an operator's own time belongs to: what its inner operators take is theirs.

The first group that claims an operator has it:

optimizer         inside `Optimizer.step`, or part of the gradient's norm and clipping
base matmuls      a matrix product with the sizes of one of the backbone's linear layers, forward or backward
head and loss     any other product with a side of the vocabulary's (or label set's) size; passes over logits; the loss
adapters          any other product of which a side is a small multiple of the rank; the rest of a fused LoRA function
attention         batched products, softmax, fused attention, and what runs inside a function named for attention
dequantization    operators of bitsandbytes
layers            norms, gates, activations, rotary positions, dropout, and element-wise sums and products elsewhere
python, autograd  between operators: Python and autograd's engine
other             the rest: embedding lookups, copies, indexing
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.backbones.dims import Dims
from peftkit.methods.base import Method
from peftkit.methods.lora import Lora

ELEMENTWISE = re.compile(
    r"mul|add|sub|div|neg|pow|rsqrt|mean|sum|cos|sin|cat|bernoulli|(silu|gelu|sigmoid|tanh)(_backward)?|_foreach_add"
)
INSIDE: dict[str, re.Pattern[str]] = {
    "optimizer": re.compile(r"^Optimizer\.|_fused_adam|_foreach_(norm|mul)|linalg_vector_norm|clip_coef"),
    "head and loss": re.compile(r"(?i)cross_?entropy|nll_?loss|log_?softmax|logsumexp"),
    "attention": re.compile(r"(?i)attention|(?<!log_)softmax|^aten::(bmm|baddbmm)|_(Products|Spread|Collect)"),
    "dequantization": re.compile(r"bitsandbytes|dequantize"),
    "adapters": re.compile(r"_LoraLinear"),
    "layers": re.compile(r"(?i)norm|_Gated|_Rotate|dropout"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers that tell a model's matrix products apart: (in, out) of its linear layers and of its head."""

    base: frozenset[frozenset[int]]
    rank: int | None
    outputs: int

    @classmethod
    def of(cls, method: Method, dims: Dims) -> Sizes:
        """The sizes of a backbone under a method."""
        base = frozenset(frozenset((linear.in_features, linear.out_features)) for linear in dims.linears)
        rank = method.rank if isinstance(method, Lora) else None
        return cls(base, rank, dims.vocab if dims.head.kind == "language" else dims.head.num_outputs)

    def group(self, sides: Sequence[int]) -> str | None:
        """The group of a matrix product from its three sides, one of which counts tokens."""
        pairs = {frozenset(pair) for pair in ((sides[0], sides[1]), (sides[1], sides[2]), (sides[0], sides[2]))}
        if pairs & self.base:
            return "base matmuls"
        if self.outputs in sides:
            return "head and loss"
        adapted = self.rank is not None and any(side in [n * self.rank for n in range(1, 5)] for side in sides)
        return "adapters" if adapted else None


def group_of(event: Any, sizes: Sizes) -> str:
    """The group that an operator's own time belongs to."""
    lineage = list(ancestry(event))
    if any(INSIDE["optimizer"].search(name) for name in lineage):
        return "optimizer"
    name = event.name.removeprefix("aten::").rstrip("_")
    shapes = [shape for shape in event.input_shapes or [] if shape]
    product = shapes[1:3] if name in ("addmm", "_addmm_activation") else shapes[:2] if name in ("mm", "linear") else []
    if len(product) == 2 and all(len(shape) >= 2 for shape in product):
        left, right = product
        found = sizes.group((math.prod(left[:-1]), left[-1], right[0] if name == "linear" else right[-1]))
        if found:
            return found
    for group, pattern in INSIDE.items():
        if any(pattern.search(name) for name in lineage):
            return group
    if any(shape[-1] == sizes.outputs for shape in shapes):
        return "head and loss"
    if event.name.startswith(("ProfilerStep", "autograd::")) or not event.name.startswith("aten::"):
        return "python, autograd"
    return "layers" if ELEMENTWISE.fullmatch(name) else "other"


def ancestry(event: Any) -> Iterator[str]:
    """The event's name and those around it, innermost first."""
    while event is not None:
        yield event.name
        event = event.cpu_parent
