"""Full finetuning: every weight trains, held in float32, or in bfloat16 by an optimizer that loses no update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftkit.backbones.dims import Dims
from peftkit.backbones.spec import Quantization
from peftkit.errors import MethodError
from peftkit.methods.base import Adapted, Method, TaskKind, raise_trainable_to_float32, require_trainable_weights

if TYPE_CHECKING:
    from peftkit.backbones.load import Backbone


class Full(Method):
    """Train everything. The quality to beat, and the memory to save."""

    kind: Literal["full"] = "full"
    weights: Literal["float32", "stochastic", "kahan"] = Field(
        "float32",
        description="float32 weights (16 bytes each with gradient and moments), or bfloat16 ones that are rounded "
        "stochastically (12 bytes) or keep what rounding lost (kahan, 14 bytes)",
    )

    def trainable_params(self, dims: Dims) -> int:
        return dims.num_params

    def check(self, dims: Dims, task: TaskKind, quantization: Quantization) -> None:
        require_trainable_weights(self.kind, quantization)

    def attach(self, backbone: Backbone) -> Adapted:
        """Float32 weights compute in the backbone's dtype by autocast; bfloat16 ones compute as they are.

        Raises:
            MethodError: bfloat16 weights are asked for on a backbone that does not compute in bfloat16.
        """
        import torch

        narrow, model = backbone.compute_dtype, backbone.model
        if self.weights == "float32":
            model.float().requires_grad_(True)
            return Adapted(model, "model", autocast=None if narrow == torch.float32 else narrow)
        if narrow != torch.bfloat16:
            raise MethodError(
                f"method.weights={self.weights} holds the weights in bfloat16, and the backbone computes in "
                f"{str(narrow).removeprefix('torch.')}. Set backbone.dtype=bfloat16, or method.weights=float32."
            )
        model.requires_grad_(False)
        for name in backbone.dims.head_modules:
            model.get_submodule(name).requires_grad_(True)
        raise_trainable_to_float32(model)  # a new head alone
        model.requires_grad_(True)
        return Adapted(model, "model", rounding=self.weights)

    def label(self, quantization: Quantization) -> str:
        return self.kind if self.weights == "float32" else f"{self.kind}-{self.weights}"
