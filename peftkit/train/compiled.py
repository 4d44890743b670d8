"""Compilation of the repeated block, once for all of them."""

from __future__ import annotations

from torch import nn

from peftkit.errors import InputError
from peftkit.train.frozen_layers import repeated_blocks


def compile_blocks(model: nn.Module, *, first: int = 0) -> None:
    """Compile the repeated blocks from `first` on, for any number of tokens; they share one compilation.

    Raises:
        InputError: the model has no list of repeated blocks.
    """
    blocks = repeated_blocks(model)
    if blocks is None:
        raise InputError(
            f"training.compile compiles a model's repeated block, and {type(model).__name__} has none. "
            "Set training.compile=false."
        )
    for block in list(blocks)[first:]:
        block.compile(dynamic=True)
