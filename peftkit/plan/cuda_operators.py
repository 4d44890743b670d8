"""What CUDA would choose and allocate where the simulation runs operators on fake CPU tensors.

Shapes: B examples, Q query heads, K key heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from peftkit.plan.storages import Scratch

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What of a CUDA device decides memory.

    Attributes:
        capability: such as (7, 5) for a T4 or (8, 9) for an L40S.
        context_bytes: what the driver holds for a process outside of the allocator.
    """

    capability: tuple[int, int] = (8, 6)
    context_bytes: int = 300 * 2**20

    @property
    def workspace_bytes(self) -> int:
        """cuBLAS's workspace, one for each thread that multiplies: torch's defaults."""
        return 32 * 2**20 if self.capability[0] == 9 else (2 * 4096 + 8 * 16) * 2**10

    @property
    def flash(self) -> bool:
        """Whether FlashAttention 2 runs on it."""
        return self.capability >= (8, 0)


@contextmanager
def cuda_operators(architecture: Architecture, *, repeat_heads: bool = False) -> Iterator[None]:
    """Attention, softmax and dropout as CUDA's kernels compute them: what they save for the backward pass differs.

    Args:
        repeat_heads: keys and values are repeated for each query head before attention, as some trainers do.
    """
    attend = partial(_attention, architecture, repeat_heads)
    with ExitStack() as patches:
        for name, substitute in (
            ("scaled_dot_product_attention", attend),
            ("softmax", _softmax),
            ("dropout", _dropout),
        ):
            patches.enter_context(patch.object(functional, name, substitute))
        yield


def scratch_of(architecture: Architecture) -> dict[Any, Scratch]:
    """What CUDA's kernels allocate within one call, besides their outputs."""
    import_module("bitsandbytes")  # registers its operators

    return {
        aten._softmax_backward_data.default: Scratch(_softmax_product),
        aten._scaled_dot_product_efficient_attention_backward.default: Scratch(
            partial(_efficient_workspace, architecture)
        ),
        aten._scaled_dot_product_flash_attention_backward.default: Scratch(_flash_workspace),
        torch.ops.bitsandbytes.gemm_4bit.default: Scratch(_unpacked_weight, first=True),
    }


def _attention(
    architecture: Architecture,
    repeat_heads: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's choice: flash without a mask, else memory-efficient given a key for each query head, else products."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
    if repeat_heads and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
    if architecture.flash and attn_mask is None and not repeat_heads and query.dtype in HALF:
        return flash_attention(query, key, value, dropout=dropout_p, causal=is_causal, scale=scale)
    if key.shape[1] != query.shape[1]:
        plain: Tensor = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
        return plain
    bias = None if attn_mask is None else _attention_bias(attn_mask, query, key)
    keeps = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
    )[0]
    return out


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    """FlashAttention 2; with variable lengths it saves and allocates what it does for one long example."""
    out: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scale)[0]
    return out


def _attention_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the memory-efficient kernel wants it: added to the scores, rows aligned to eight elements."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    keys = mask.shape[-1]
    if keys % 8:
        mask = functional.pad(mask, (0, 8 - keys % 8))[..., :keys]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """From float16 to float32 in one kernel; any other dtype is converted first."""
    assert dim is not None
    if input.dtype == torch.float16 and dtype == torch.float32:
        return aten._softmax(input, dim, True)  # type: ignore[no-any-return]
    return torch.softmax(input, dim, dtype=dtype)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Saves a mask of one byte an element."""
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _softmax_product(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[int]:
    """`gradient x output`, which the kernel sums over."""
    return [args[0].nbytes]


def _efficient_workspace(architecture: Architecture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[int]:
    """float32 sums for the gradients of narrow dtypes, as CUTLASS's kernel lays them out in blocks of 64 x 64.

    Where the head does not fit into a block of queries, keys and values are summed in memory too, in several splits.
    """
    query, key = args[1], args[2]
    batch, heads, queries, size = query.shape
    keys, streams = key.shape[2], batch * heads
    delta = streams * queries * 4
    if query.dtype not in HALF:
        return [delta]
    block = 128 if architecture.flash and size > 64 else 64
    blocks = math.ceil(queries / block) * math.ceil(size / block)
    elements = blocks * (block * block + 4)
    if size > block:
        splits = max(1, min(math.ceil(keys / 64), 200 // streams))
        elements += 2 * splits * _up(keys, 64) * _up(size, 64)
    return [delta, streams * elements * 4]


def _flash_workspace(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[int]:
    """Queries' gradient in float32, the sums of the softmax, and keys' and values' gradients for each query head."""
    query, key = args[1], args[2]
    batch, heads, queries, size = query.shape
    rows, width = _up(queries, 128), _up(size, 32 if size <= 128 else 64)
    sums = batch * heads * rows * 4
    repeated = batch * heads * key.shape[2] * size * query.element_size() if key.shape[1] != heads else 0
    return [sums * width + sums + 2 * repeated]


def _unpacked_weight(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[int]:
    """The weight in the inputs' dtype; its nested scales in float32."""
    inputs, shape = args[0], args[2]
    weight = shape[0] * shape[1] * inputs.element_size()
    scales = kwargs.get("absmax_8bit")
    return [weight + (0 if scales is None else 8 * scales.numel())]


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
