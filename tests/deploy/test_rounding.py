"""Rounding once: to nearest where the delta survives it, stochastically and without bias where it would not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftkit.deploy.rounding import round_parameters, round_stochastically, snapshot


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_gives_one_of_the_two_neighbours_and_the_mean_is_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.tensor([1.0, -1.5, 0.375, 100.0, 3e-3]).to(dtype).float()
    spacing = torch.ldexp(torch.full_like(low, torch.finfo(dtype).eps), torch.frexp(low).exponent - 1)
    exact = (low + 0.3 * spacing).repeat(40_000, 1)
    found = round_stochastically(exact, dtype, generator).float()
    assert bool(((found == low) | (found == low + spacing)).all())
    shares = ((found - low) / spacing).mean(0)
    assert shares.tolist() == pytest.approx([0.3] * 5, abs=4 * (0.3 * 0.7 / 40_000) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_that_the_dtype_holds_stay_what_they_are(dtype: torch.dtype) -> None:
    grid = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(1)), torch.zeros(3)]).to(dtype)
    assert torch.equal(round_stochastically(grid.float(), dtype, torch.Generator().manual_seed(0)), grid)


@pytest.mark.parametrize(("size", "dithered"), [(0.3, 0), (1e-5, 1), (0.0, 0)])
def test_a_tensor_is_dithered_only_where_nearest_would_lose_its_delta(size: float, dithered: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False).to(torch.bfloat16)
    base = snapshot(layer, torch.bfloat16)
    left, right = torch.randn(256, 2), torch.randn(2, 256)
    delta = size * left @ right
    exact = base["weight"].float() + delta
    layer.weight.data = exact.clone()
    assert round_parameters(layer, torch.bfloat16, base) == dithered
    if dithered:
        kept = (layer.weight.data.float() - base["weight"].float()).mul(delta).sum() / delta.square().sum()
        lost = (exact.bfloat16().float() - base["weight"].float()).mul(delta).sum() / delta.square().sum()
        assert abs(float(kept) - 1) < 0.1 < abs(float(lost) - 1)
    else:
        assert torch.equal(layer.weight.data, exact.bfloat16())


def test_the_same_weights_round_the_same_way_every_time() -> None:
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    first, second = (round_stochastically(exact, torch.bfloat16, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
