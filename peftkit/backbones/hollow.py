"""A model of every shape and no storage: each parameter is one zero, seen as often as its shape asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.backbones.load import auto_class, headed
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import Head


def build_hollow(config: Any, head: Head, tokenizer: Any = None) -> Any:
    """The model of a configuration on the CPU, in float32: parameters hollow, tied ones tied, buffers computed."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False), quietly():
        model = auto_class(head).from_config(headed(config, head, tokenizer), dtype=torch.float32)
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                hollow = nn.Parameter(hollow_tensor(parameter.shape), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), hollow)
    return model.eval()


def hollow_tensor(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Zeros of a shape that take four bytes; they cannot be written to."""
    return torch.zeros(()).expand(shape)


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no storage."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize
