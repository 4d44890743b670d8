"""Which layers recompute their activations in the backward pass instead of keeping them."""

from __future__ import annotations

from typing import Any


def set_checkpointing(model: Any, layers: str | int) -> None:
    """Checkpoint no layer (`off`, `auto`), every layer (`all`), or the first `layers` of them.

    Recomputation is the non-reentrant kind: it needs no gradient at the inputs of a frozen model and keeps hooks.
    """
    if layers in ("off", "auto"):
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.activation_checkpointing_enable({"use_reentrant": False})
    if isinstance(layers, int):
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for block in blocks[layers:]:
            block.gradient_checkpointing = False
