"""Which attention a card would choose, seen by what the choice allocates.

Shapes: B examples, Q query heads, K key heads, T tokens, D head size.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from peftkit.plan.cuda_operators import Architecture, cuda_operators
from peftkit.plan.fake import fake_tensors
from peftkit.plan.storages import Birth, StorageTracker

B, Q, T, D = 2, 8, 64, 32
AMPERE, TURING = Architecture((8, 6)), Architecture((7, 5))


def attended(card: Architecture, heads: int, dtype: torch.dtype, *, masked: bool = False) -> list[Birth]:
    """What attention with so many key heads allocates."""
    with fake_tensors(masked=False), cuda_operators(card), StorageTracker() as tracker:
        query, key, value = (torch.empty(B, count, T, D, dtype=dtype) for count in (Q, heads, heads))
        mask = torch.empty(B, 1, T, T, dtype=torch.bool) if masked else None
        before = len(tracker.stream.births)
        functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=heads != Q)
    return tracker.stream.births[before:]


def kinds(births: list[Birth]) -> set[str]:
    return {word for birth in births for word in ("flash", "efficient") if word in birth.operator}


@pytest.mark.parametrize(
    ("card", "heads", "dtype", "masked", "expected"),
    [
        (AMPERE, Q, torch.bfloat16, False, {"flash"}),
        (AMPERE, 2, torch.bfloat16, False, {"flash"}),
        (AMPERE, Q, torch.bfloat16, True, {"efficient"}),
        (AMPERE, Q, torch.float32, False, {"efficient"}),
        (TURING, Q, torch.float16, False, {"efficient"}),
    ],
)
def test_fused_attention_by_card_dtype_and_mask(
    card: Architecture, heads: int, dtype: torch.dtype, masked: bool, expected: set[str]
) -> None:
    assert kinds(attended(card, heads, dtype, masked=masked)) == expected


@pytest.mark.parametrize(("card", "dtype"), [(AMPERE, torch.float32), (TURING, torch.float16)])
def test_keys_shared_by_query_heads_are_attended_plainly_without_flash(card: Architecture, dtype: torch.dtype) -> None:
    # the memory-efficient kernel wants a key for each query head; what is left holds whole matrices of scores
    births = attended(card, 2, dtype)
    assert kinds(births) == set()
    assert max(birth.num_bytes for birth in births) >= B * Q * T * T * dtype.itemsize


def test_autocast_narrows_what_is_attended() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kinds(attended(AMPERE, 2, torch.float32)) == {"flash"}
