"""Outputs that are looked up against those that torch works out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.plan import fake
from peftkit.plan.cuda_operators import Architecture
from peftkit.plan.shapes import ShapeMode
from peftkit.plan.simulate import open_trace
from peftkit.plan.sizes import fully_labelled
from peftkit.plan.storages import Stream
from peftkit.recipe import Recipe

Operation = Callable[[Tensor, Tensor], Any]


def form(value: Any) -> Any:
    """All that tells a fake tensor from another."""
    if isinstance(value, tuple | list):
        return [form(inner) for inner in value]
    return (
        value.shape,
        value.stride(),
        value.storage_offset(),
        value.dtype,
        value.device,
        value.untyped_storage().nbytes(),
    )


@pytest.mark.parametrize(
    "operate",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y.T,
        lambda x, y: x.T[1:, :2],
        lambda x, y: x.view(6, 2).split(2),
        lambda x, y: x.bfloat16(),
        lambda x, y: torch.var_mean(x, 0),
        lambda x, y: x.max(1),
        lambda x, y: torch.nn.functional.layer_norm(x, (4,)),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch._foreach_mul([x, y], 2.0),
    ],
)
def test_a_call_that_was_seen_gives_what_it_gave(operate: Operation) -> None:
    with FakeTensorMode():
        expected = form(operate(torch.empty(3, 4), torch.empty(3, 4)))
    with ShapeMode():
        x, y = torch.empty(3, 4), torch.empty(3, 4)
        assert form(operate(x, y)) == form(operate(x, y)) == expected


def test_views_share_the_storage_of_their_own_argument() -> None:
    with ShapeMode():
        x, y = torch.empty(3, 4), torch.empty(3, 4)
        seen, looked_up = x.t(), y.t()
    assert seen.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert looked_up.untyped_storage()._cdata == y.untyped_storage()._cdata != x.untyped_storage()._cdata


def test_an_operator_returns_the_argument_that_it_wrote_to() -> None:
    with ShapeMode():
        x, y, z = (torch.empty(3) for _ in range(3))
        assert x.add_(x) is x
        # not the same call: the result is the first argument or the last, and here these differ
        assert torch.add(x, x, out=x) is x
        assert torch.add(x, y, out=z) is z
        assert torch.add(y, x, out=z) is z
        assert y.add_(x) is y


def test_numbers_of_other_kinds_are_other_calls() -> None:
    with ShapeMode():
        x = torch.empty(3, dtype=torch.int64)
        assert [(x * number).dtype for number in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]


def test_a_whole_step_is_the_same_by_either_way(
    chat_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = chat_recipe("training.checkpointing=all", "method.dropout=0.1")

    def stream() -> Stream:
        config = AutoConfig.from_pretrained(recipe.backbone.name)
        steps = [fully_labelled((40, 12))] * 2
        depth, trace = open_trace(recipe, LANGUAGE_HEAD, steps=steps, card=Architecture((8, 9)), config=config)
        return trace(depth.stretches)

    looked_up = stream()
    monkeypatch.setattr(fake, "ShapeMode", lambda: FakeTensorMode(allow_non_fake_inputs=True))
    assert looked_up == stream()
