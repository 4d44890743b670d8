"""Plain LoRA folds row by row to the very numbers of PEFT's layer; whatever is not plain is left to PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from peftkit.deploy.fold import fold_module
from peftkit.deploy.rounding import CHUNK, round_once
from peftkit.deploy.rows import FEWEST, row_fold


def adapted(outputs: int, inputs: int, **settings: Any) -> Any:
    """A LoRA of random numbers on one linear layer of numbers that bfloat16 holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    model[0].weight.data = model[0].weight.data.bfloat16().float()
    usual = {"r": 8, "lora_alpha": 12, "target_modules": ["0"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**{**usual, **settings})).base_model.model[0]


def assert_same_but_for_order(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but where a BLAS sums eight products in another order: by a step of the grid in one number of a thousand,
    or by roundings of float32."""
    differing = found != expected
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    elif differing.any():
        assert differing.float().mean() < 1e-3
        torch.testing.assert_close(found, expected, rtol=1.01 * torch.finfo(found.dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        (2, 40),
        (300, 1000),  # a part ends within a row
        (CHUNK // 1024 + 1, 1024),  # a part of one row
        (20, CHUNK // FEWEST + 500),  # a part has fewer rows than are multiplied
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fine", [False, True])
def test_rows_fold_to_the_numbers_of_pefts_layer(outputs: int, inputs: int, dtype: torch.dtype, fine: bool) -> None:
    layer = adapted(outputs, inputs)
    narrow = dtype != torch.float32
    layer.lora_B["default"].weight.data *= torch.finfo(dtype).eps / 8 if fine and narrow else 1.0
    base = layer.get_base_layer().weight
    held = base.detach().to(dtype, copy=True)
    base.data = held.float().clone()
    rows = row_fold(layer)
    assert rows is not None
    found = held.clone()
    dither = rows.fold_into(found, "w")
    fold_module(layer)
    expected, _ = round_once(base.detach(), dtype, held if narrow else None, "w")
    assert dither == (fine and narrow)
    assert_same_but_for_order(found, expected)
    assert not torch.equal(found, held)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"r": 4, "use_rslora": True, "use_dora": True}]
)
def test_what_is_not_plain_is_left_to_peft(settings: dict[str, Any]) -> None:
    assert row_fold(adapted(16, 16, **settings)) is None
    assert row_fold(nn.Linear(4, 4)) is None


def test_factors_that_are_not_in_float32_are_left_to_peft() -> None:
    layer = adapted(16, 16)
    layer.lora_A["default"].bfloat16()
    layer.lora_B["default"].bfloat16()
    assert row_fold(layer) is None
