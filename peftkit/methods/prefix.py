"""Prefix tuning: trained keys and values in front of every layer's own (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from peftkit.backbones.dims import Dims
from peftkit.backbones.spec import Quantization
from peftkit.errors import MethodError
from peftkit.methods.base import Adapted, Method, TaskKind, attach_peft

if TYPE_CHECKING:
    from peftkit.backbones.load import Backbone


class Prefix(Method):
    """`virtual_tokens` keys and values a layer; `projection` makes them through a two-layer MLP of that width."""

    checkpointable = False  # transformers drops the trained keys and values from a layer that recomputes

    kind: Literal["prefix"] = "prefix"
    virtual_tokens: PositiveInt = 20
    projection: PositiveInt | None = None

    def trainable_params(self, dims: Dims) -> int:
        width = dims.layers * 2 * dims.kv_heads * (dims.hidden // dims.heads)
        if self.projection is None:
            return self.virtual_tokens * width + dims.head_params
        token = dims.kv_heads * (dims.hidden // dims.heads)
        embedding = self.virtual_tokens * token
        mlp = token * self.projection + self.projection + self.projection * width + width
        return embedding + mlp + dims.head_params

    def check(self, dims: Dims, task: TaskKind, quantization: Quantization) -> None:
        if dims.head_dim * dims.heads != dims.hidden:
            raise MethodError(
                f"method 'prefix' needs heads x head_dim = hidden, and {dims.model_type} has {dims.heads} x "
                f"{dims.head_dim} against {dims.hidden}. Use method=lora or method=prompt."
            )

    def attach(self, backbone: Backbone) -> Adapted:
        from peft import PrefixTuningConfig, TaskType

        dims = backbone.dims
        config = PrefixTuningConfig(
            task_type=TaskType.SEQ_CLS if dims.head_modules else TaskType.CAUSAL_LM,
            num_virtual_tokens=self.virtual_tokens,
            prefix_projection=self.projection is not None,
            encoder_hidden_size=self.projection,
            modules_to_save=list(dims.head_modules) or None,
        )
        return attach_peft(backbone, config)
