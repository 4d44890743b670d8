"""LoRA folded into a weight where that lies, a few rows at a time, to the numbers of PEFT's layer.

PEFT forms the delta whole, scales it into another matrix and adds that to the weight, widened into a third: matrices
that are made anew for every layer, and take longer to get from the system than to compute. Rows that stay in a core's
cache from the product to the rounding need none of them. Bits are PEFT's own wherever the BLAS sums the products of
these rows as it sums those of all.

Shapes: O outputs, I inputs, R rank, B rows of O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.deploy.rounding import CHUNK, Part, round_into

FEWEST = 16
"""Rows multiplied at a time, at least: of very few, a BLAS sums the products in another order."""


@dataclass(frozen=True, slots=True)
class RowFold:
    """`weight_OI + scaling * up_OR @ down_RI`, the factors in float32."""

    up_OR: Tensor
    down_RI: Tensor
    scaling: float

    def fold_into(self, weight_OI: Tensor, name: str) -> bool:
        """Change a weight in place, rounded once to its dtype; whether that was done stochastically.

        Args:
            name: of the weight.
        """
        base = weight_OI if weight_OI.dtype != torch.float32 else None
        return round_into(weight_OI, self._exact(weight_OI), base, name)

    def _exact(self, weight_OI: Tensor) -> Part:
        outputs, inputs = weight_OI.shape
        flat = weight_OI.view(-1)
        delta_BI = torch.empty(min(outputs, max(FEWEST, CHUNK // inputs + 2)), inputs)

        def part(at: int) -> Tensor:
            end = min(at + CHUNK, flat.numel())
            last = -(-end // inputs)
            first = max(0, min(at // inputs, last - FEWEST))
            torch.mm(self.up_OR[first:last], self.down_RI, out=delta_BI[: last - first])
            delta = delta_BI.view(-1)[at - first * inputs : end - first * inputs]
            return delta.mul_(self.scaling).add_(flat[at:end])

        return part


def row_fold(layer: Any) -> RowFold | None:
    """How a layer's adapter folds; None for anything but one plain LoRA on a linear layer."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear or type(layer.get_base_layer()) is not nn.Linear or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.fan_in_fan_out:
        return None
    (name,) = active
    up, down = layer.lora_B[name], layer.lora_A[name]
    plain = name not in layer.lora_variant and not layer.lora_bias[name] and type(up) is type(down) is nn.Linear
    if not plain or not up.weight.dtype == down.weight.dtype == torch.float32:
        return None
    return RowFold(up.weight.detach(), down.weight.detach(), layer.scaling[name])
