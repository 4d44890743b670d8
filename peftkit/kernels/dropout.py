"""Dropout whose mask costs a few nanoseconds an element on a CPU, and which keeps one byte of it for the backward pass.

torch's `bernoulli_` turns one draw into one element; here one draw of 64 bits decides four. All bits come from torch's
own generator, so a seed, a restored generator state or recomputation in the backward pass give the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from peftkit.kernels.autograd import apply

LEVELS: Final = 1 << 16
"""Chances that 16 bits tell apart: p is rounded to a multiple of 1 / LEVELS, so it is off by 2**-17 at most."""


def keep_mask(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """True for what stays, each with the chance 1 - p; by `bernoulli_` on devices other than the CPU."""
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=torch.bool, device=device).bernoulli_(1 - p)
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(1 << 63), None)
    if type(words) is not Tensor:  # a fake tensor: it has a size, and no bits to look at
        return (words.view(torch.int16)[:count] >= 0).view(tuple(shape))
    # numpy compares 16-bit integers in vectors, torch one by one
    kept = words.numpy().view(np.uint16)[:count] >= round(p * LEVELS)
    return torch.from_numpy(kept).view(tuple(shape))


def dropout(x: Tensor, p: float) -> Tensor:
    """x / (1 - p) where kept and 0 elsewhere: dropout as in training."""
    if x.device.type != "cpu":
        return functional.dropout(x, p, training=True)
    out: Tensor = apply(_Dropout, x, p)
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = keep_mask(x.shape, p, x.device)
        ctx.save_for_backward(mask)
        ctx.p = p
        return _masked(x, mask, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _masked(grad, mask, ctx.p), None


def _masked(x: Tensor, mask: Tensor, p: float) -> Tensor:
    # as bytes: torch converts them to floats in vectors, booleans one by one
    kept = mask.view(torch.int8).to(x.dtype)
    return kept.mul_(x).mul_(0.0 if p == 1 else 1 / (1 - p))
