"""PEFT's LoRA layers computing by `lora_linear`: one operation for each layer, or for the siblings that share an input.

PEFT runs base, A, dropout, B, scaling and sum as separate operations, and copies the input to float32 for each layer of
a narrower backbone. Only `forward` of the layers is replaced here; modules, parameters and state dicts stay PEFT's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from peftkit.kernels.dropout import keep_mask
from peftkit.kernels.lora_linear import Term, lora_linear

SIBLINGS: Final = (
    ("q_proj", "k_proj", "v_proj"),  # attention of the llama family
    ("gate_proj", "up_proj"),  # its gated unit
    ("query", "key", "value"),  # attention of the BERT family
)
"""Names of layers under one parent that are given the same input."""


@dataclass(frozen=True, slots=True)
class Fused:
    """What became of a model's LoRA layers.

    Attributes:
        layers: how many run as one operation.
        groups: how many such operations serve two layers or three.
        left: how many run as PEFT runs them, by the reason.
    """

    layers: int
    groups: int
    left: Mapping[str, int]

    def __str__(self) -> str:
        left = [f"{count} left to PEFT: {reason}" for reason, count in self.left.items()]
        return "; ".join([f"{self.layers} LoRA layers fused, {self.groups} groups among them share their input", *left])


def fuse_lora(model: nn.Module) -> Fused:
    """Run the LoRA layers of a PEFT model as one operation each, and siblings with one input together.

    A layer still runs PEFT's own forward whenever its state asks for more than the plain formula: adapters disabled,
    merged, mixed or exchanged, autocast, hooks on the base layer, arguments beside the input.
    """
    unfuse_lora(model)
    reasons = {layer: _unfit(layer) for layer in _lora_layers(model)}
    fit = [layer for layer, reason in reasons.items() if reason is None]
    groups = list(_siblings(model, fit))
    together = {layer for group in groups for layer in group}
    for group in [*groups, *([layer] for layer in fit if layer not in together)]:
        shared = _Group(tuple(group))
        for index, layer in enumerate(group):
            layer.forward = _FusedForward(shared, index)
    return Fused(len(fit), len(groups), dict(Counter(reason for reason in reasons.values() if reason is not None)))


def unfuse_lora(model: nn.Module) -> None:
    """Give every fused layer PEFT's own forward back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _FusedForward):
            del module.forward


class _Group:
    """Layers that are given the same input, and the outputs that wait for those not called yet."""

    def __init__(self, layers: tuple[Any, ...]) -> None:
        self.layers = layers
        self.shared = len(layers) > 1
        self.forget()

    def forget(self) -> None:
        """Drop what waits."""
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """The output that waits for a layer, if it waits for this layer and this very input."""
        if self.input is not x or index not in self.waiting:
            return None
        taken = self.waiting.pop(index)
        if not self.waiting:
            self.forget()
        return taken

    def compute(self, index: int, x: Tensor) -> Tensor | None:
        """A layer's output, those of its siblings left waiting; None where PEFT's own forward must run."""
        repeated = self.input is x
        if index in self.waiting and not repeated:
            self.shared = False  # waited for, but called with another input, as in cross-attention
        self.forget()
        terms = {index: _term(self.layers[index], x)}
        if terms[index] is None:
            return None
        if self.shared and not repeated:
            terms |= {i: _term(layer, x) for i, layer in enumerate(self.layers) if i != index}
        ready = {i: term for i, term in terms.items() if term is not None}
        outputs = dict(zip(ready, lora_linear(x, list(ready.values())), strict=True))
        taken = outputs.pop(index)
        if outputs:
            self.input, self.waiting = x, outputs
        return taken


@dataclass(frozen=True, slots=True)
class _FusedForward:
    """The `forward` of a fused layer."""

    group: _Group
    index: int

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs:
            output = self.group.take(self.index, x)
            if output is None:
                output = self.group.compute(self.index, x)
            if output is not None:
                return output
        layer = self.group.layers[self.index]
        own: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return own


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer computes with in its present state."""

    base: Any
    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    dropout: nn.Module
    scale: float


def _lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _siblings(model: nn.Module, fit: Sequence[Any]) -> Iterator[list[Any]]:
    """Groups of two or more layers that the table puts together."""
    among = set(fit)
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in SIBLINGS:
            group = [children[name] for name in names if name in children and children[name] in among]
            if len(group) > 1 and len({layer.in_features for layer in group}) == 1:
                yield group


def _unfit(layer: Any) -> str | None:
    """Why a LoRA layer is not fused, in words; None when it is."""
    from bitsandbytes.nn import Linear4bit
    from peft.tuners import lora

    base = layer.base_layer
    dense = type(layer) is lora.Linear and type(base) is nn.Linear and not layer.fan_in_fan_out
    packed = type(layer) is lora.Linear4bit and isinstance(base, Linear4bit)
    if not dense and not packed:
        return f"{type(layer).__name__} over {type(base).__name__}"
    if "forward" in vars(layer):
        return "something else replaced its forward"
    parts = _parts(layer)
    return parts if isinstance(parts, str) else None


def _parts(layer: Any) -> _Parts | str:
    """What the layer computes with; or why its state asks for PEFT's own forward, in words."""
    modules = layer._modules  # registered modules by name: `nn.Module.__getattr__` is slow for as many as are read here
    base, downs, ups = modules["base_layer"], modules["lora_A"]._modules, modules["lora_B"]._modules
    active = [name for name in layer.active_adapters if name in downs]
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    if len(active) != 1:
        return f"{len(active)} of its adapters are active"
    name = active[0]
    if name in layer.lora_variant:
        return f"its update is a {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias[name]:
        return "its update has a bias"
    weight = base._parameters["weight"]
    if weight.requires_grad:
        return "its base weight trains"
    if _observed(base, downs[name], ups[name]):
        return "hooks are on its parts"
    down, up = downs[name]._parameters["weight"], ups[name]._parameters["weight"]
    dropout = modules["lora_dropout"]._modules[name]
    return _Parts(base, weight, base._parameters["bias"], down, up, dropout, layer.scaling[name])


def _observed(base: nn.Module, *factors: nn.Module) -> bool:
    """Whether hooks would be missed. Those that only cast the input of A or B would not: it is cast here."""
    if base._forward_pre_hooks or "forward" in vars(base):
        return True
    return any(part._forward_hooks or part._backward_hooks or part._backward_pre_hooks for part in (base, *factors))


def _term(layer: Any, x: Tensor) -> Term | None:
    """The layer's term for this input, its dropout's mask drawn; None where PEFT's own forward must run."""
    parts = _parts(layer)
    if isinstance(parts, str) or torch.is_autocast_enabled(x.device.type):
        return None
    quant_state = None
    if type(parts.base) is nn.Linear:
        if parts.weight.dtype != x.dtype:
            return None
    else:
        quant_state = getattr(parts.weight, "quant_state", None)
        if quant_state is None or not _unpackable(parts.base, quant_state, x.dtype):
            return None
    mask, kept = None, 1.0
    if isinstance(parts.dropout, nn.Dropout) and parts.dropout.training and parts.dropout.p > 0:
        kept = 1.0 - parts.dropout.p
        mask = keep_mask((x.numel() // x.shape[-1], x.shape[-1]), parts.dropout.p, x.device)
    return Term(parts.weight, parts.bias, parts.down, parts.up, parts.scale, mask, kept, quant_state)


def _unpackable(base: Any, quant_state: Any, dtype: torch.dtype) -> bool:
    """Whether `dequantize_4bit` gives the weight [M, K] that bitsandbytes would multiply inputs of this dtype by."""
    if base.compute_dtype not in (None, dtype) or vars(quant_state).get("packing_format_for_cpu"):
        return False
    return tuple(quant_state.shape) == (base.out_features, base.in_features)
