"""A dropout mask has the chance it was asked for, comes from torch's generator alone, and is all that is kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peftkit.kernels.dropout import LEVELS, dropout, keep_mask

CPU = torch.device("cpu")


def beyond_chance(kept: Tensor, p: float) -> bool:
    """Whether a count of kept elements lies over five standard deviations of the binomial from its mean."""
    count = kept.numel()
    slack = 5 * math.sqrt(count * p * (1 - p)) + count / (2 * LEVELS)
    return abs(int(kept.sum()) - count * (1 - p)) > slack


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_kept_fraction_lies_within_the_binomial(p: float) -> None:
    torch.manual_seed(0)
    kept = keep_mask((1000, 1000), p, CPU)
    assert kept.dtype == torch.bool
    assert not beyond_chance(kept, p)


@pytest.mark.parametrize("lane", range(4))
def test_each_quarter_of_a_word_has_the_same_chance_and_its_own_bits(lane: int) -> None:
    torch.manual_seed(0)
    lanes = keep_mask((250_000, 4), 0.3, CPU)
    assert not beyond_chance(lanes[:, lane], 0.3)
    assert not beyond_chance(lanes[:, lane] & lanes[:, lane - 1], 1 - 0.7**2)
    assert not beyond_chance(lanes[1:, lane] & lanes[:-1, lane], 1 - 0.7**2)


def test_a_chance_of_zero_keeps_all_and_of_one_nothing() -> None:
    assert keep_mask((LEVELS,), 0.0, CPU).all()
    assert not keep_mask((LEVELS,), 1.0, CPU).any()
    assert torch.equal(dropout(torch.ones(9), 1.0), torch.zeros(9))


@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (3, 5), (2, 3, 7)])
def test_a_mask_has_any_shape(shape: tuple[int, ...]) -> None:
    assert keep_mask(shape, 0.5, CPU).shape == shape


def test_torchs_seed_and_its_saved_state_decide_the_mask() -> None:
    torch.manual_seed(3)
    first = keep_mask((64, 64), 0.5, CPU)
    state = torch.get_rng_state()
    second = keep_mask((64, 64), 0.5, CPU)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(keep_mask((64, 64), 0.5, CPU), second)
    torch.manual_seed(3)
    assert torch.equal(keep_mask((64, 64), 0.5, CPU), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_as_torch_scales_it_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(40, 50).to(dtype).requires_grad_()
    dy = torch.randn(40, 50).to(dtype)
    torch.manual_seed(1)
    mask = keep_mask(x.shape, 0.3, CPU)
    torch.manual_seed(1)
    y = dropout(x, 0.3)
    y.backward(dy)
    scale = 1 / (1 - 0.3)
    assert torch.equal(y, x * mask * scale)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ops.aten.native_dropout_backward(dy, mask, scale))


def test_one_byte_an_element_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(30, 40, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        dropout(x, 0.1)
    assert sum(tensor.nbytes for tensor in kept) == 30 * 40


def test_recomputation_in_the_backward_pass_draws_the_same_mask() -> None:
    x, weight = torch.randn(20, 30), torch.randn(30, 30, requires_grad=True)

    def gradient(*, again: bool) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return dropout(torch.tanh(x @ weight), 0.4) @ weight

        torch.manual_seed(2)
        y = checkpoint(block, x, use_reentrant=False) if again else block(x)
        keep_mask((1000,), 0.5, CPU)  # moves the generator on between the passes
        (found,) = torch.autograd.grad(y.square().sum(), weight)
        return found

    assert torch.equal(gradient(again=True), gradient(again=False))


def test_fake_tensors_pass_through_both_ways() -> None:
    with FakeTensorMode():
        x = torch.randn(5, 7, requires_grad=True)
        dropout(x, 0.1).sum().backward()
        mask = keep_mask((5, 7), 0.1, CPU)
    assert x.grad is not None
    assert x.grad.shape == (5, 7)
    assert (mask.dtype, tuple(mask.shape)) == (torch.bool, (5, 7))
