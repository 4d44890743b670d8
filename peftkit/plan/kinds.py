"""Saying what a model's and an optimizer's storages are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftkit.plan.storages import StorageTracker


def tag_weights(tracker: StorageTracker, model: nn.Module, *, adapted: bool) -> None:
    """Name the storages of parameters and buffers.

    Args:
        adapted: what trains was put beside the model's own weights; else it is these that train.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        tracker.tag(tensor, _kind(tensor, state, adapted=adapted))
        if state is not None:
            nested = (state.state2.absmax, state.state2.code) if state.nested else ()
            for scale in (state.absmax, state.code, *nested):
                tracker.tag(scale, "quantization scales")


def tag_gradients(tracker: StorageTracker, model: nn.Module) -> None:
    """Name the gradients that there are."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            tracker.tag(parameter.grad, "gradients")


def tag_state(tracker: StorageTracker, state: Any) -> None:
    """Name every tensor in an optimizer's state, however deep."""
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        if isinstance(value, Tensor):
            tracker.tag(value, "optimizer state")
        else:
            tag_state(tracker, value)


def _kind(tensor: Tensor, quant_state: Any, *, adapted: bool) -> str:
    if quant_state is not None:
        return "weights, quantized"
    return "adapters" if adapted and tensor.requires_grad else "weights"
