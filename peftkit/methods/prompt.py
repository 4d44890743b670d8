"""Prompt tuning: trained embeddings in front of the input's own (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from peftkit.backbones.dims import Dims
from peftkit.methods.base import Adapted, Method, attach_peft

if TYPE_CHECKING:
    from peftkit.backbones.load import Backbone


class Prompt(Method):
    """`virtual_tokens` trained vectors of the hidden size before the first token."""

    kind: Literal["prompt"] = "prompt"
    virtual_tokens: PositiveInt = 20
    init: Literal["vocabulary", "random", "text"] = Field("vocabulary", description="Where the vectors start from")
    init_text: str | None = Field(None, description="With init: text, the words whose embeddings they start as")

    @model_validator(mode="after")
    def _text_is_given_where_it_is_used(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init: text and init_text belong together; give both or neither")
        return self

    def trainable_params(self, dims: Dims) -> int:
        return self.virtual_tokens * dims.hidden + dims.head_params

    def attach(self, backbone: Backbone) -> Adapted:
        from peft import PromptTuningConfig, TaskType

        dims = backbone.dims
        names = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM", "text": "TEXT"}
        config = PromptTuningConfig(
            task_type=TaskType.SEQ_CLS if dims.head_modules else TaskType.CAUSAL_LM,
            num_virtual_tokens=self.virtual_tokens,
            prompt_tuning_init=names[self.init],
            prompt_tuning_init_text=self.init_text,
            tokenizer_name_or_path=str(backbone.folder) if self.init == "text" else None,
            modules_to_save=list(dims.head_modules) or None,
        )
        return attach_peft(backbone, config)
