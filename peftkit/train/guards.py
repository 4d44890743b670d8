"""What must never happen silently in training: a loss that is no number, weights that do not move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from peftkit.errors import Diverged, GuardTripped

SETTLED_STEPS = 2
"""Steps after which every trained tensor must have moved: zero-initialised factors hold their partners back for one."""


class MovementGuard:
    """Watches, over the first steps, that what should train does."""

    def __init__(self, trainable: Mapping[str, torch.nn.Parameter]) -> None:
        self._trainable = trainable
        self._before = {name: _fingerprint(parameter) for name, parameter in trainable.items()}
        self._without_gradient: set[str] = set(trainable)

    def see_gradients(self, received: set[str]) -> None:
        """Take note of the parameters that had a gradient in a step."""
        self._without_gradient -= received

    def judge(self) -> dict[str, Any]:
        """What was found, once `SETTLED_STEPS` are done.

        Raises:
            GuardTripped: no tensor has a gradient, or none moved.
        """
        still = [name for name, p in self._trainable.items() if _fingerprint(p) == self._before[name]]
        if len(self._without_gradient) == len(self._trainable):
            raise GuardTripped(
                "no trained tensor received a gradient: the loss does not depend on what the method trains. "
                "Check method.targets and method.layers."
            )
        if len(still) == len(self._trainable):
            raise GuardTripped(
                f"no trained tensor moved in {SETTLED_STEPS} steps. Raise training.learning_rate (it may underflow), "
                "or check that the examples carry loss."
            )
        return {
            "tensors": len(self._trainable),
            "without_gradient": sorted(self._without_gradient),
            "unmoved": sorted(still),
        }


def require_finite(loss: float, gradient_norm: float, step: int) -> None:
    """Stop a run whose loss or gradient is not a number.

    Raises:
        Diverged: with the step and the usual remedies.
    """
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise Diverged(
            f"step {step}: the loss is {loss} and the gradient norm {gradient_norm}. Try a tenth of "
            "training.learning_rate, a longer training.warmup, or backbone.dtype=float32."
        )


def _fingerprint(parameter: torch.nn.Parameter) -> tuple[float, float]:
    values = parameter.detach()
    return float(values.sum(dtype=torch.float64)), float(values.abs().sum(dtype=torch.float64))
