"""Putting a recipe's kernels on a model."""

from __future__ import annotations

from torch import nn

from peftkit.kernels.layers import lean_layers
from peftkit.kernels.lora import fuse_lora
from peftkit.kernels.spec import Kernels


def install_kernels(model: nn.Module, kernels: Kernels) -> list[str]:
    """Replace how modules compute, as far as the recipe wants it and the modules are known; what was done, in words."""
    said: list[str] = []
    if kernels.lora:
        fused = fuse_lora(model)
        said += [str(fused)] if fused.layers or fused.left else []
    if kernels.layers:
        leaned = lean_layers(model)
        said += [str(leaned)] if leaned.dropouts + leaned.norms + leaned.gated_units + leaned.rotations else []
    return said
