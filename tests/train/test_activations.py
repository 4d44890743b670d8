"""Activations: which layers recompute theirs, that nothing runs below what trains, and what is moved to the host."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkit.backbones.load import load_backbone
from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.errors import InputError
from peftkit.methods.base import Adapted
from peftkit.recipe import Recipe
from peftkit.train.activations import OFFLOADED_BYTES, open_offload, saving_on_host, set_checkpointing

LABELS = Head("classification", ("bad", "good"), "single_label_classification")
IDS = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]])


def attached(recipe: Recipe) -> Adapted:
    torch.manual_seed(0)
    head = LABELS if recipe.task.kind == "classify" else LANGUAGE_HEAD
    adapted = recipe.method.attach(load_backbone(recipe.backbone, head))
    adapted.model.train()
    return adapted


def gradients(adapted: Adapted, recipe: Recipe) -> dict[str, Tensor]:
    """Gradients of one step with the same dropout at every call."""
    labels = torch.tensor([0, 1]) if recipe.task.kind == "classify" else IDS
    adapted.model.zero_grad()
    torch.manual_seed(7)
    adapted.model(input_ids=IDS, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in adapted.trainable().items() if p.grad is not None}


def four_layers() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    return model.train()


def forwards(model: Any) -> list[int]:
    """How often each layer's attention runs in one forward and backward pass."""
    counts: Counter[int] = Counter()
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda module, args, index=index: counts.update([index]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [counts[index] for index in range(len(model.model.layers))]


@pytest.mark.parametrize(
    ("setting", "lowest_trained", "expected"),
    [
        ("off", 0, [1, 1, 1, 1]),
        ("auto", 0, [1, 1, 1, 1]),
        ("all", 0, [2, 2, 2, 2]),
        (1, 0, [2, 1, 1, 1]),
        (3, 0, [2, 2, 2, 1]),
        (9, 0, [2, 2, 2, 2]),
        (1, 2, [1, 1, 2, 1]),  # layers 0 and 1 are frozen and keep nothing: recomputing them would free nothing
        (2, 1, [1, 2, 2, 1]),
        ("all", 2, [1, 1, 2, 2]),
    ],
)
def test_exactly_the_lowest_layers_with_a_backward_pass_recompute(
    setting: str | int, lowest_trained: int, expected: list[int]
) -> None:
    model: Any = four_layers()
    if lowest_trained:
        model.model.embed_tokens.requires_grad_(False)
    for block in model.model.layers[:lowest_trained]:
        block.requires_grad_(False)
    set_checkpointing(model, setting)
    assert forwards(model) == expected


def test_below_trained_embeddings_every_frozen_layer_has_a_backward_pass() -> None:
    model: Any = four_layers()
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    set_checkpointing(model, 2)
    assert forwards(model) == [2, 2, 1, 1]


@pytest.mark.parametrize("setting", ["all", 1])
@pytest.mark.parametrize("method", ["full", {"kind": "lora", "dropout": 0.2}, "prompt"])
@pytest.mark.parametrize("task", ["chat", "classify"])
def test_recomputed_activations_give_the_same_gradients(
    task: str, method: Any, setting: str | int, chat_recipe: Any, classify_recipe: Any
) -> None:
    # The encoder's own dropout of 0.1 and LoRA's have to fall alike when they are drawn again.
    recipe = {"chat": chat_recipe, "classify": classify_recipe}[task](method=method)
    adapted = attached(recipe)
    plain = gradients(adapted, recipe)
    set_checkpointing(adapted.model, setting)
    again = gradients(adapted, recipe)
    assert plain.keys() == again.keys() == adapted.trainable().keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name  # the same operations on the same numbers


def test_a_model_without_layers_that_recompute_is_refused() -> None:
    with pytest.raises(InputError, match=r"Linear has none\. Set training\.checkpointing=off"):
        set_checkpointing(nn.Linear(2, 2), "all")


@pytest.mark.parametrize("checkpointing", ["off", "all"])
@pytest.mark.parametrize("task", ["chat", "classify"])
def test_no_gradient_flows_below_the_lowest_trained_layer(
    checkpointing: str, task: str, chat_recipe: Any, classify_recipe: Any
) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    recipe = {"chat": chat_recipe, "classify": classify_recipe}[task](method={"kind": "lora", "layers": "top-1"})
    adapted = attached(recipe)
    set_checkpointing(adapted.model, checkpointing)
    blocks = [module for module in adapted.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) == 2
    outputs: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    found = gradients(adapted, recipe)
    assert [output.requires_grad for output in outputs] == [False, True]
    assert found.keys() == adapted.trainable().keys()
    assert not [name for name in found if ".0." in name.partition("layer")[2]]


def test_what_is_offloaded_is_copied_and_small_tensors_and_parameters_are_not() -> None:
    # What the forward saved is changed before the backward: a copy gives the old gradient, the tensor itself the new.
    layer = nn.Linear(8, 64, bias=False)  # 512 weights, as many as the large input has elements
    weight = layer.weight.detach().clone()
    source = torch.ones(64, 8, requires_grad=True)
    large, small = source * 1.0, torch.ones(2, 8)
    with saving_on_host(layer, smallest_bytes=large.nbytes):
        total = layer(large).sum() + layer(small).sum()
    with torch.no_grad():
        large.mul_(5)
        small.mul_(3)
        layer.weight.mul_(2)
    total.backward()
    assert layer.weight.grad is not None
    assert source.grad is not None
    # d sum(y) / dW adds up the rows of x: 64 old ones of the large input, two new ones of the small
    assert torch.equal(layer.weight.grad, torch.full((64, 8), 64.0 + 2 * 3))
    torch.testing.assert_close(source.grad, 2 * weight.sum(0).expand(64, 8))


def test_offloading_is_refused_where_it_would_move_nothing() -> None:
    with pytest.raises(InputError, match=r"this run is on cpu\. Set training\.offload_activations=false"):
        open_offload(nn.Linear(2, 2), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_offloaded_activations_leave_the_device_and_come_back() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(8))).cuda()
    x_NH = torch.randn(4096, 512, device="cuda")  # 8 MiB in float32, of which each of 16 operations saves one
    held, found = [], []
    for context in (nullcontext(), open_offload(layers, torch.device("cuda"))):
        layers.zero_grad()
        before = torch.cuda.memory_allocated()
        with context:
            total = layers(x_NH).square().sum()
        held.append(torch.cuda.memory_allocated() - before)
        total.backward()
        found.append([parameter.grad.clone() for parameter in layers.parameters() if parameter.grad is not None])
    assert x_NH.nbytes > OFFLOADED_BYTES
    assert held[1] < 2 * x_NH.nbytes < 14 * x_NH.nbytes < held[0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
