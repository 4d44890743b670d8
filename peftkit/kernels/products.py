"""Attention of short examples: two batched matrix products around a softmax, group by group.

For shapes see `attention.py`. The softmax accumulates in float32, whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from peftkit.kernels.autograd import apply
from peftkit.kernels.dropout import keep_mask
from peftkit.kernels.segments import Blocks, Group, Segments

LONGEST_KEPT: Final = 128
"""Longest example whose probabilities are kept for the backward pass; those of longer ones are computed again there."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What shapes the scores besides queries and keys."""

    scaling: float
    causal: bool
    window: int | None = None
    softcap: float | None = None


def attend_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    terms: Terms,
    *,
    front: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Queries [1, Q, N, D], keys and values [1, K, N, D] -> [1, N, Q, D].

    Args:
        front: keys and values [1, K, P, D] that every example sees besides its own.
    """
    keys, values = (None, None) if front is None else front
    out: Tensor = apply(_Products, query, key, value, keys, values, segments, terms, dropout)
    return out


class _Products(torch.autograd.Function):
    """All groups' queries, keys and values are put into blocks at once, and their gradients back."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        front_keys: Tensor | None,
        front_values: Tensor | None,
        segments: Segments,
        terms: Terms,
        dropout: float,
    ) -> Tensor:
        heads, key_heads = query.shape[1], key.shape[1]
        virtual = 0 if front_keys is None else front_keys.shape[2]
        of_queries, of_keys = segments.blocks(heads), segments.blocks(key_heads, virtual=virtual)
        q = of_queries.gather(query)
        k, v = of_keys.gather(key, front_keys), of_keys.gather(value, front_values)
        out = torch.empty_like(q)
        kept, masks = [], []
        groups = _by_group(segments, key_heads, (of_queries, (q, out)), (of_keys, (k, v)))
        for group, (q_, out_, k_, v_) in groups:
            chances = dropped = _chances(segments, group, q_, k_, terms)
            if dropout:
                mask = keep_mask(chances.shape, dropout, chances.device).view(torch.int8)  # multiplies faster than bool
                dropped = chances * mask
                masks.append(mask)
            torch.baddbmm(out_, dropped, v_, beta=0, alpha=1 / (1 - dropout), out=out_)
            kept += [chances] if group.longest <= LONGEST_KEPT else []
        ctx.save_for_backward(q, k, v, *kept, *masks)
        ctx.settings = (segments, terms, dropout, heads, key_heads, virtual)
        return of_queries.collect(out)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        segments, terms, dropout, heads, key_heads, virtual = ctx.settings
        masks = rest[-len(segments.groups) :] if dropout else []
        of_queries, of_keys = segments.blocks(heads), segments.blocks(key_heads, virtual=virtual)
        d_out = of_queries.gather_gradient(grad.transpose(1, 2))
        d_q, d_k, d_v = (torch.empty_like(blocks) for blocks in (q, k, v))
        groups = _by_group(segments, key_heads, (of_queries, (q, d_q, d_out)), (of_keys, (k, d_k, v, d_v)))
        scale, kept = 1 / (1 - dropout), iter(rest)
        for index, (group, (q_, dq_, d_out_, k_, dk_, v_, dv_)) in enumerate(groups):
            chances = next(kept) if group.longest <= LONGEST_KEPT else _chances(segments, group, q_, k_, terms)
            d_chances = torch.baddbmm(chances, d_out_, v_.transpose(1, 2), beta=0, alpha=scale)
            dropped = chances
            if dropout:
                d_chances.mul_(masks[index])
                dropped = chances * masks[index]
            torch.baddbmm(dv_, dropped.transpose(1, 2), d_out_, beta=0, alpha=scale, out=dv_)
            d_scores = torch.ops.aten._softmax_backward_data(d_chances, chances, -1, chances.dtype)
            if terms.softcap is not None:
                d_scores = d_scores.mul_(1 - (_capped(q_, k_, terms) / terms.softcap) ** 2)
            torch.baddbmm(dq_, d_scores, k_, beta=0, alpha=terms.scaling, out=dq_)
            torch.baddbmm(dk_, d_scores.transpose(1, 2), q_, beta=0, alpha=terms.scaling, out=dk_)
        pairs = ((of_queries, d_q), (of_keys, d_k), (of_keys, d_v))
        packed = (blocks.collect(rows)[None].transpose(1, 2) for blocks, rows in pairs)
        fronts = (of_keys.collect_front(rows) if virtual else None for rows in (d_k, d_v))
        return (*packed, *fronts, None, None, None)


def _by_group(
    segments: Segments, key_heads: int, *sides: tuple[Blocks, tuple[Tensor, ...]]
) -> Iterator[tuple[Group, tuple[Tensor, ...]]]:
    """Each group with its part of all the rows: [B K, G T, D] of queries' and [B K, S, D] of keys'."""
    views = [blocks.views(rows, key_heads) for blocks, many in sides for rows in many]
    return zip(segments.groups, zip(*views, strict=True), strict=True)


def _chances(segments: Segments, group: Group, q: Tensor, k: Tensor, terms: Terms) -> Tensor:
    """Probabilities [B K, G T, S] in the queries' dtype."""
    scores = None if terms.softcap is None else _capped(q, k, terms)
    dtype = q.dtype if scores is None else scores.dtype
    made_of = (group.start, q.shape, k.shape, terms, dtype)
    mask = segments.memo(made_of, lambda: _mask(group, terms, q, k, dtype))
    if scores is None:
        start, beta = (q.new_empty(()), 0) if mask is None else (mask, 1)
        scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=beta, alpha=terms.scaling)
    elif mask is not None:
        scores = scores.add_(mask)
    return torch.softmax(scores, -1).to(q.dtype)


def _capped(q: Tensor, k: Tensor, terms: Terms) -> Tensor:
    """Scores under the soft cap of Gemma 2, cap * tanh(score / cap), in float32 at least."""
    assert terms.softcap is not None
    raw = torch.bmm(q, k.transpose(1, 2))
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return wide.mul_(terms.scaling / terms.softcap).tanh_().mul_(terms.softcap)


def _mask(group: Group, terms: Terms, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor | None:
    """0 where a query may look, -inf elsewhere, to be added to [B K, G T, S]; None where every key is in sight."""
    virtual, zero = k.shape[1] - group.longest, k.new_zeros((), dtype=dtype)
    if not terms.causal:
        if group.kept is None:
            return None
        seen_BS = functional.pad(group.real_BT, (virtual, 0), value=True)
        hidden = zero.new_zeros(seen_BS.shape).masked_fill_(~seen_BS, -torch.inf)
        return hidden.repeat_interleave(k.shape[0] // group.examples, 0)[:, None, :]
    hidden_TT = zero.new_full((group.longest, group.longest), -torch.inf).triu_(1)
    if terms.window is not None and terms.window < group.longest:
        hidden_TT = hidden_TT + torch.full_like(hidden_TT, -torch.inf).tril_(-terms.window)
    return functional.pad(hidden_TT, (virtual, 0)).repeat(q.shape[1] // group.longest, 1)
