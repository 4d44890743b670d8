"""Where the activations wait for the backward pass: kept, computed again, or moved to the host's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peftkit.errors import InputError

OFFLOADED_BYTES = 2**20
"""Smaller tensors stay on the device: moving them costs a launch each and frees next to nothing."""


def set_checkpointing(model: nn.Module, layers: str | int) -> None:
    """Recompute no layer (`off`, `auto`), every layer (`all`), or `layers` of them in the backward pass.

    The lowest ones that have a backward pass are chosen: they recompute last, when the activations of the layers above
    are gone, so the layer being recomputed does not add to the peak. Recomputation is the non-reentrant kind: it keeps
    hooks, and needs no gradient at the inputs of a frozen model, which transformers' own switch would demand.

    Raises:
        InputError: the model has no layers that can recompute.
    """
    if layers in ("off", "auto"):
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise InputError(
            f"training.checkpointing={layers} needs layers that can recompute their activations, and "
            f"{type(model).__name__} has none. Set training.checkpointing=off."
        )
    chosen = _LowestLayers(blocks, layers if isinstance(layers, int) else len(blocks))
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(chosen.run, index)


class _LowestLayers:
    """Recomputes the lowest `count` of the blocks that have a backward pass; those below keep nothing anyway."""

    def __init__(self, blocks: Sequence[nn.Module], count: int) -> None:
        self._count = count
        self._trains = [any(p.requires_grad for p in block.parameters()) for block in blocks]
        self._has_backward = [False] * len(blocks)

    def run(self, index: int, block: Callable[..., Any], *inputs: Any) -> Any:
        """The output of block `index`, called in ascending order by every forward pass."""
        needed = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        self._has_backward[index] = needed or self._trains[index]
        above_chosen = index >= self._count and self._has_backward[index - self._count]
        if above_chosen or not self._has_backward[index]:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)


def open_offload(model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """A context for forward passes, entered any number of times: what they save waits in pinned host memory.

    Parameters stay where they are, and so do tensors below `OFFLOADED_BYTES`.

    Raises:
        InputError: the device's memory is the host's, or it is not CUDA.
    """
    if device.type != "cuda":
        raise InputError(
            f"training.offload_activations moves activations from a CUDA device to the host's memory, and this run is "
            f"on {device.type}. Set training.offload_activations=false; training.checkpointing saves memory anywhere."
        )
    return saving_on_host(model, smallest_bytes=OFFLOADED_BYTES)


def saving_on_host(model: nn.Module, *, smallest_bytes: int) -> AbstractContextManager[object]:
    """The context of `open_offload`, for a model on any device."""
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if tensor.nbytes < smallest_bytes or tensor.untyped_storage().data_ptr() in held:
            return None, tensor
        # on one stream, so the device's memory is given on only after it was read
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, pinned.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor if device is None else tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
