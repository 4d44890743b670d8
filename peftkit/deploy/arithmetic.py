"""The arithmetic of combining tensors: weighted sums, and what is pruned before them.

- linear: the tensors as they are (task arithmetic: Ilharco et al. 2023, arXiv:2212.04089)
- magnitude: each tensor's largest entries
- ties: each tensor's largest entries, and of these the mean over the parts whose sign wins (Yadav et al. 2023,
  arXiv:2306.01708)
- dare: random entries, enlarged so that the expectation stays (Yu et al. 2024, arXiv:2311.03099)
- dare-ties: random entries, and of these the mean over the parts whose sign wins

The formulas are those of PEFT's `add_weighted_adapter`, but for three points: a part of negative weight votes with its
opposite signs, a part of weight zero has no vote, and a vote that ends in a draw leaves zero, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Arithmetic = Literal["linear", "ties", "dare", "dare-ties", "magnitude"]
ELECTS = ("ties", "dare-ties")
"""These average the parts that agree, so that a weight of 1 each keeps the size of the parts."""
DRAWS = ("dare", "dare-ties")


def combine_tensors(
    how: Arithmetic,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """One tensor of many of the same shape.

    Args:
        density: the share of entries that pruning keeps; not used by linear.
        seeds: one a tensor, for what is drawn at random: which entries of it are kept.
    """
    kept = [(t, w, s) for t, w, s in zip(tensors, weights, seeds or range(len(tensors)), strict=True) if w != 0]
    if not kept:
        return torch.zeros_like(tensors[0])
    signed = [tensor if weight > 0 else -tensor for tensor, weight, _ in kept]
    if how in DRAWS:
        signed = [keep_random(tensor, density, seed=seed) for tensor, (_, _, seed) in zip(signed, kept, strict=True)]
    elif how != "linear":
        signed = [keep_largest(tensor, density) for tensor in signed]
    stacked = torch.stack(signed)
    scale = torch.tensor([abs(weight) for _, weight, _ in kept], dtype=stacked.dtype)
    weighted = stacked * scale.view(-1, *[1] * (stacked.dim() - 1))
    return _mean_of_elected(stacked, weighted) if how in ELECTS else weighted.sum(0)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, as many as `density` of them rounded down; zeros elsewhere."""
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    chosen = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, chosen, flat[chosen]).view_as(tensor)


def keep_random(tensor: Tensor, density: float, *, seed: int) -> Tensor:
    """Each entry with probability `density`, divided by it; the expectation is the tensor."""
    if density >= 1:
        return tensor
    generator = torch.Generator().manual_seed(seed)
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def _mean_of_elected(stacked: Tensor, weighted: Tensor) -> Tensor:
    """Of each entry, the mean over the parts that have the sign of the sum of all parts; zero where that is zero."""
    agrees = stacked.sign() == stacked.sum(0).sign()
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
