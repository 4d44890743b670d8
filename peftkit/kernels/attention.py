"""Attention over examples that lie end to end, each seeing only itself.

Registered with transformers' attention interface; models reach it through their own attention modules, and the bounds
of the examples come along as the keyword argument `segments`. Softmax accumulates in float32.

Shapes: N packed tokens, Q query heads, K key heads, G = Q / K, D head size, P virtual tokens in front of every example;
inside a group of examples of like lengths B examples, T the longest, S = P + T keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from peftkit.kernels.autograd import apply
from peftkit.kernels.dropout import keep_mask
from peftkit.kernels.segments import Group, Segments

PRODUCTS: Final = "peftkit"
FUSED: Final = "peftkit-fused"
LONGEST_PRODUCT = 128
"""Longest example that products are taken for. Above it torch's fused kind is faster (`benchmarks/attention_kinds.py`),
and it holds no matrix of scores."""

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Terms:
    """What shapes the scores besides queries and keys."""

    scaling: float
    causal: bool
    window: int | None = None
    softcap: float | None = None


@contextmanager
def packed_attention(model: Any, *, products: bool = True) -> Iterator[None]:
    """The model attends through this module; its own implementation is back afterwards.

    Args:
        products: by batched matrix products where that is faster; else by torch's own fused attention where it can.
    """
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = PRODUCTS if products else FUSED
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    prefix: Sequence[KeysValues] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    products: bool = True,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: queries [1, Q, N, D], keys and values [1, K, N, D] -> [1, N, Q, D].

    Args:
        prefix: for each layer, keys and values [1, K, P, D] that every example sees besides its own.
    """
    # autocast computes values in its dtype, and norms that train leave queries and keys in float32
    query, key = query.to(value.dtype), key.to(value.dtype)
    terms = _Terms(scaling, bool(module.is_causal), sliding_window, softcap)
    front = None if prefix is None else prefix[module.layer_idx]
    plain = terms.softcap is None and dropout == 0.0 and front is None
    narrow = query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)
    if plain and narrow:
        return _by_varlen(query, key, value, segments, terms), None
    fits = max(segments.lengths) <= (sliding_window or max(segments.lengths))
    fused = _num_fused(segments, products=products) if plain and fits else 0
    if fused == len(segments.groups):
        return _by_groups(query, key, value, segments, terms), None
    if fused:
        long, short = segments.split(fused)
        rows = [sum(long.lengths), sum(short.lengths)]
        (q, *qs), (k, *ks), (v, *vs) = (torch.split(states, rows, 2) for states in (query, key, value))
        parts = [_by_groups(q, k, v, long, terms), apply(_Products, *qs, *ks, *vs, None, None, short, terms, dropout)]
        return torch.cat(parts, 1), None
    keys, values = (None, None) if front is None else (front[0].to(key.dtype), front[1].to(value.dtype))
    out: Tensor = apply(_Products, query, key, value, keys, values, segments, terms, dropout)
    return out, None


def _num_fused(segments: Segments, *, products: bool) -> int:
    """How many groups, from the first on, torch's fused kind is faster for; packed batches begin with the longest."""
    groups = segments.groups
    short = (index for index, group in enumerate(groups) if products and group.longest <= LONGEST_PRODUCT)
    return next(short, len(groups))


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: _Terms) -> Tensor:
    """FlashAttention over variable lengths, which ships with torch for CUDA."""
    from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler with it

    back = -1 if terms.window is None else terms.window - 1
    q_NQD, k_NKD, v_NKD = (states[0].transpose(0, 1) for states in (query, key, value))
    longest, bounds = max(segments.lengths), segments.bounds
    window = (back, 0) if terms.causal else (-1, -1)
    out_NQD = varlen_attn(
        q_NQD,
        k_NKD,
        v_NKD,
        bounds,
        bounds,
        longest,
        longest,
        scale=terms.scaling,
        window_size=window,
        enable_gqa=q_NQD.shape[1] != k_NKD.shape[1],
    )
    assert isinstance(out_NQD, Tensor)
    return out_NQD[None]


def _by_groups(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: _Terms) -> Tensor:
    """torch's fused attention, one call a group of like lengths."""
    parts = []
    for group in segments.groups:
        q, k, v = (_examples(group, states[0].transpose(0, 1)).transpose(1, 2) for states in (query, key, value))
        mask = None if terms.causal or group.kept is None else group.real_BT[:, None, None, :]
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=terms.scaling, is_causal=terms.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(group.collect(out.transpose(1, 2).flatten(0, 1)))
    return torch.cat(parts)[None]


class _Products(torch.autograd.Function):
    """Two batched matrix products around a softmax. The backward pass computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        front_keys: Tensor | None,
        front_values: Tensor | None,
        segments: Segments,
        terms: _Terms,
        dropout: float,
    ) -> Tensor:
        out_NQD = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        normalizers, masks = [], []
        for group in segments.groups:
            q, k, v = _blocks(group, query, key, value, front_keys, front_values)
            scores = _scores(q, k, group, terms, query.shape[1] // key.shape[1])
            normalizer = torch.logsumexp(scores, -1, keepdim=True)
            chances = scores.sub_(normalizer).exp_()
            if dropout:
                mask = keep_mask(chances.shape, dropout, chances.device)
                chances = chances.mul_(mask.view(torch.int8)).div_(1 - dropout)  # int8 multiplies faster than bool
                masks.append(mask)
            blocks = torch.bmm(chances.to(v.dtype), v)
            out_NQD[group.start : group.stop] = group.collect(_rows(blocks, group, key.shape[1]))
            normalizers.append(normalizer)
        ctx.save_for_backward(query, key, value, front_keys, front_values, out_NQD, *normalizers, *masks)
        ctx.settings = (segments, terms, dropout)
        return out_NQD[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, front_keys, front_values, out_NQD, *rest = ctx.saved_tensors
        segments, terms, dropout = ctx.settings
        count, per_key = len(segments.groups), query.shape[1] // key.shape[1]
        grad_NQD, virtual = gradients[0][0], 0 if front_keys is None else front_keys.shape[2]
        d_query, d_key, d_value = (torch.empty_like(states[0].transpose(0, 1)) for states in (query, key, value))
        d_front = None if front_keys is None else (torch.zeros_like(front_keys), torch.zeros_like(front_values))
        for index, group in enumerate(segments.groups):
            q, k, v = _blocks(group, query, key, value, front_keys, front_values)
            d_out = _to_blocks(group.spread_gradient(grad_NQD), group, key.shape[1])
            out = _to_blocks(group.spread(out_NQD), group, key.shape[1])
            raw = None if terms.softcap is None else _capped(q, k, terms)
            scores = _scores(q, k, group, terms, per_key)
            chances = scores.sub_(rest[index]).exp_()
            d_chances = _wide(torch.bmm(d_out, v.transpose(1, 2)))
            dropped = chances
            if dropout:
                scale = rest[count + index].view(torch.int8).to(chances.dtype).div_(1 - dropout)
                d_chances, dropped = d_chances.mul_(scale), chances * scale
            dv = torch.bmm(dropped.to(v.dtype).transpose(1, 2), d_out)
            inner = (_wide(d_out) * _wide(out)).sum(-1, keepdim=True)
            d_scores = d_chances.sub_(inner).mul_(chances)
            if raw is not None:
                d_scores = d_scores.mul_(1 - (raw / terms.softcap) ** 2)
            d_scores = d_scores.mul_(terms.scaling).to(q.dtype)
            dq, dk = torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q)
            if d_front is not None:
                for total, grads in zip(d_front, (dk, dv), strict=True):
                    own = grads[:, :virtual]
                    total += own.reshape(group.examples, -1, virtual, own.shape[-1]).sum(0, keepdim=True)
                dk, dv = dk[:, virtual:], dv[:, virtual:]
            where = slice(group.start, group.stop)
            d_query[where] = group.collect(_rows(dq, group, key.shape[1]))
            d_key[where] = group.collect(_rows(dk, group, key.shape[1]))
            d_value[where] = group.collect(_rows(dv, group, key.shape[1]))
        packed = tuple(states.transpose(0, 1)[None] for states in (d_query, d_key, d_value))
        return (*packed, *(d_front or (None, None)), None, None, None)


def _blocks(
    group: Group, query: Tensor, key: Tensor, value: Tensor, front_keys: Tensor | None, front_values: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A group's queries [B K, G T, D] and keys and values [B K, S, D]."""
    heads = key.shape[1]
    q, k, v = (_to_blocks(group.spread(x[0].transpose(0, 1)), group, heads) for x in (query, key, value))
    if front_keys is not None and front_values is not None:
        k, v = (
            torch.cat([front[0].repeat(group.examples, 1, 1), own], 1)
            for front, own in ((front_keys, k), (front_values, v))
        )
    return q, k, v


def _examples(group: Group, packed: Tensor) -> Tensor:
    """The group's rows of [N, ...], padded: [B, T, ...]."""
    rows = group.spread(packed)
    return rows.view(group.examples, group.longest, *rows.shape[1:])


def _to_blocks(rows: Tensor, group: Group, heads: int) -> Tensor:
    """[B T, K G, D] -> [B K, G T, D]."""
    split = rows.view(group.examples, group.longest, heads, -1, rows.shape[-1])
    return split.permute(0, 2, 3, 1, 4).reshape(group.examples * heads, -1, rows.shape[-1])


def _rows(blocks: Tensor, group: Group, heads: int) -> Tensor:
    """[B K, G T, D] -> [B T, K G, D]."""
    split = blocks.view(group.examples, heads, -1, group.longest, blocks.shape[-1])
    return split.permute(0, 3, 1, 2, 4).reshape(group.examples * group.longest, -1, blocks.shape[-1])


def _scores(q: Tensor, k: Tensor, group: Group, terms: _Terms, per_key: int) -> Tensor:
    """Scaled and masked scores [B K, G T, S] in float32."""
    mask = _mask(group, terms, k, heads=q.shape[0] // group.examples, per_key=per_key)
    if terms.softcap is not None:
        scores = _capped(q, k, terms)
    elif mask is not None and mask.dtype == q.dtype:
        return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=terms.scaling)
    else:
        scores = _wide(torch.bmm(q, k.transpose(1, 2))).mul_(terms.scaling)
    return scores if mask is None else scores.add_(mask)


def _capped(q: Tensor, k: Tensor, terms: _Terms) -> Tensor:
    """Scores under the soft cap of Gemma 2: cap * tanh(score / cap)."""
    assert terms.softcap is not None
    return _wide(torch.bmm(q, k.transpose(1, 2))).mul_(terms.scaling / terms.softcap).tanh_().mul_(terms.softcap)


def _wide(states: Tensor) -> Tensor:
    """At least float32."""
    return states if states.dtype == torch.float64 else states.float()


def _mask(group: Group, terms: _Terms, k: Tensor, *, heads: int, per_key: int) -> Tensor | None:
    """0 where a query may look, -inf elsewhere, to be added to [B K, G T, S]; None where every key is in sight."""
    num_keys, zero = k.shape[1], k.new_zeros((), dtype=torch.promote_types(k.dtype, torch.float32))
    if not terms.causal:
        if group.kept is None:
            return None
        seen_BS = functional.pad(group.real_BT, (num_keys - group.longest, 0), value=True)
        hidden = zero.new_zeros(seen_BS.shape).masked_fill_(~seen_BS, -torch.inf)
        return hidden.repeat_interleave(heads, 0)[:, None, :]
    virtual = num_keys - group.longest
    hidden_TT = zero.new_full((group.longest, group.longest), -torch.inf).triu_(1)
    if terms.window is not None and terms.window < group.longest:
        hidden_TT = hidden_TT + torch.full_like(hidden_TT, -torch.inf).tril_(-terms.window)
    return functional.pad(hidden_TT, (virtual, 0)).repeat(per_key, 1)


AttentionInterface.register(PRODUCTS, attend)
AttentionInterface.register(FUSED, partial(attend, products=False))
