"""Head only: the body stays frozen, the new task head trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftkit.backbones.dims import Dims
from peftkit.backbones.spec import Quantization
from peftkit.errors import MethodError
from peftkit.methods.base import Adapted, Method, TaskKind, raise_trainable_to_float32

if TYPE_CHECKING:
    from peftkit.backbones.load import Backbone


class HeadOnly(Method):
    """Linear probing: the cheapest training there is, and the floor that an adapter has to beat."""

    kind: Literal["head"] = "head"

    def trainable_params(self, dims: Dims) -> int:
        return dims.head_params

    def check(self, dims: Dims, task: TaskKind, quantization: Quantization) -> None:
        if task != "classify":
            raise MethodError(
                f"method 'head' trains a new task head, and task {task!r} has none: it uses the language-model head "
                "the backbone came with. Use method=lora, or task=classify."
            )

    def attach(self, backbone: Backbone) -> Adapted:
        model = backbone.model
        model.requires_grad_(False)
        for name in backbone.dims.head_modules:
            model.get_submodule(name).requires_grad_(True)
        raise_trainable_to_float32(model)
        return Adapted(model, "model")
