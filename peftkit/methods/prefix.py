"""Prefix tuning: trained keys and values in front of every layer's own (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from peftkit.backbones.dims import Dims
from peftkit.backbones.spec import Quantization
from peftkit.errors import MethodError
from peftkit.methods.base import Adapted, Method, TaskKind, attach_peft, has_values

if TYPE_CHECKING:
    import torch

    from peftkit.backbones.load import Backbone

Init = Literal["vocabulary", "text", "random"]


class Prefix(Method):
    """`virtual_tokens` keys and values a layer; `projection` makes them through a two-layer MLP of that width.

    A decoder starts as it is with some tokens before its input: the keys and values are those that it computes for
    them. From random ones, where an encoder or a projection starts, it has to find its way back first.
    """

    checkpointable = False  # transformers drops the trained keys and values from a layer that recomputes

    kind: Literal["prefix"] = "prefix"
    virtual_tokens: PositiveInt = 20
    projection: PositiveInt | None = None
    init: Init | None = Field(
        None,
        description="What a decoder's keys and values start as: those of random tokens of its vocabulary (the "
        "default), those of init_text, or random numbers (always, for encoders and projections)",
    )
    init_text: str | None = Field(None, min_length=1, description="With init: text, the words before the input")

    @model_validator(mode="after")
    def _text_is_given_where_it_is_used(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init: text and init_text belong together; give both or neither")
        return self

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
        if self.init in ("vocabulary", "text") and not self._can_start_from_tokens(dims):
            whose = "a projection" if self.projection is not None else f"an encoder such as {dims.model_type}"
            raise MethodError(f"method.init={self.init} is for decoders without projection, not {whose}. Leave it out.")

    def attach(self, backbone: Backbone) -> Adapted:
        from peft import PrefixTuningConfig, TaskType, initialize_kv_prefix_from_past_key_values

        dims = backbone.dims
        config = PrefixTuningConfig(
            task_type=TaskType.SEQ_CLS if dims.head_modules else TaskType.CAUSAL_LM,
            num_virtual_tokens=self.virtual_tokens,
            prefix_projection=self.projection is not None,
            encoder_hidden_size=self.projection,
            modules_to_save=list(dims.head_modules) or None,
        )
        if self.init == "random" or not self._can_start_from_tokens(dims) or not has_values(backbone.model):
            return attach_peft(backbone, config)
        pairs = _keys_and_values(backbone.model, self._first_tokens(backbone))
        adapted = attach_peft(backbone, config)
        initialize_kv_prefix_from_past_key_values(adapted.model, past_key_values=pairs)
        return adapted

    def _can_start_from_tokens(self, dims: Dims) -> bool:
        return dims.family == "decoder" and self.projection is None

    def _first_tokens(self, backbone: Backbone) -> torch.Tensor:
        """The tokens whose keys and values to start from, [1, virtual_tokens]."""
        import torch

        if self.init_text is None:
            return torch.randint(backbone.dims.vocab, (1, self.virtual_tokens))
        words = backbone.tokenizer(self.init_text)["input_ids"]
        return torch.tensor([(words * self.virtual_tokens)[: self.virtual_tokens]])


def _keys_and_values(model: Any, tokens_1P: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each layer computes for these tokens, [1, key heads, P, head width] each."""
    import torch

    with torch.no_grad():
        cache = model(input_ids=tokens_1P.to(model.device), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]
