"""Full finetuning: every weight trains, held in float32 and computed in the backbone's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftkit.backbones.dims import Dims
from peftkit.backbones.spec import Quantization
from peftkit.methods.base import Adapted, Method, TaskKind, require_trainable_weights

if TYPE_CHECKING:
    from peftkit.backbones.load import Backbone


class Full(Method):
    """Train everything. The quality to beat, and the memory to save."""

    kind: Literal["full"] = "full"

    def trainable_params(self, dims: Dims) -> int:
        return dims.num_params

    def check(self, dims: Dims, task: TaskKind, quantization: Quantization) -> None:
        require_trainable_weights(self.kind, quantization)

    def attach(self, backbone: Backbone) -> Adapted:
        import torch

        narrow = backbone.compute_dtype
        model = backbone.model.float()
        model.requires_grad_(True)
        return Adapted(model, "model", autocast=None if narrow == torch.float32 else narrow)
