"""Attention over examples that lie end to end, each seeing only itself.

Registered with transformers' attention interface; models reach it through their own attention modules, and the bounds
of the examples come along as the keyword argument `segments`. Softmax accumulates in float32.

Shapes: N packed tokens, Q query heads, K key heads, G = Q / K, D head size, P virtual tokens in front of every example;
inside a group of examples of like lengths B examples, T the longest, S = P + T keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface

from peftkit.kernels.autograd import apply
from peftkit.kernels.products import Terms, attend_by_products
from peftkit.kernels.segments import Blocks, Segments

PRODUCTS: Final = "peftkit"
FUSED: Final = "peftkit-fused"
LONGEST_PRODUCT: Final = {2: 384, 4: 96, 8: 96}
"""Longest example that products are taken for, by the bytes of a number. Above it torch's fused kind is faster
(`benchmarks/attention_kinds.py`), and it holds no matrix of scores."""

KeysValues = tuple[Tensor, Tensor]


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
    terms = Terms(scaling, bool(module.is_causal), sliding_window, softcap)
    front = None if prefix is None else prefix[module.layer_idx]
    plain = terms.softcap is None and dropout == 0.0 and front is None
    narrow = query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)
    if plain and narrow:
        return _by_varlen(query, key, value, segments, terms), None
    fits = max(segments.lengths) <= (sliding_window or max(segments.lengths))
    longest = LONGEST_PRODUCT[value.itemsize] if products else 0
    fused = _num_fused(segments, longest) if plain and fits else 0
    if fused == len(segments.groups):
        return _by_groups(query, key, value, segments, terms), None
    if fused:
        long, short = segments.split(fused)
        rows = [sum(long.lengths), sum(short.lengths)]
        (q1, q2), (k1, k2), (v1, v2) = (torch.split(states, rows, 2) for states in (query, key, value))
        parts = [_by_groups(q1, k1, v1, long, terms), attend_by_products(q2, k2, v2, short, terms)]
        return torch.cat(parts, 1), None
    return attend_by_products(query, key, value, segments, terms, front=front, dropout=dropout), None


def _num_fused(segments: Segments, longest_product: int) -> int:
    """How many groups, from the first on, torch's fused kind is taken for; packed batches begin with the longest."""
    groups = segments.groups
    return next((index for index, group in enumerate(groups) if group.longest <= longest_product), len(groups))


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: Terms) -> Tensor:
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


def _by_groups(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: Terms) -> Tensor:
    """torch's fused attention, one call a group of like lengths."""
    of_queries, of_keys = segments.blocks(query.shape[1]), segments.blocks(key.shape[1])
    sides = ((query, of_queries), (key, of_keys), (value, of_keys))
    views = (blocks.views(apply(_Spread, states, blocks)) for states, blocks in sides)
    parts = []
    for group, *own in zip(segments.groups, *views, strict=True):
        mask = None if terms.causal or group.kept is None else group.real_BT[:, None, None, :]
        q, k, v = (x.view(group.examples, -1, *x.shape[1:]) for x in own)
        part = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=terms.scaling, is_causal=terms.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(part.reshape(-1, part.shape[-1]))
    out: Tensor = apply(_Collect, torch.cat(parts), of_queries)
    return out


class _Spread(torch.autograd.Function):
    """States [1, A, N, D] as blocks. The padding's gradient is zero wherever nothing of the padding is collected."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        return blocks.gather(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.blocks.collect(grad)[None].transpose(1, 2), None


class _Collect(torch.autograd.Function):
    """Blocks of A heads as states [1, N, A, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        return blocks.collect(rows)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.blocks.gather_gradient(grad.transpose(1, 2)), None


AttentionInterface.register(PRODUCTS, attend)
AttentionInterface.register(FUSED, partial(attend, products=False))
