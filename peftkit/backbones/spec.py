"""The `backbone` section of a recipe, and the head that a task asks of it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from peftkit.spec import Section

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
Quantization = Literal["none", "nf4", "int8"]


class BackboneSpec(Section):
    """Which pretrained model, and in which numbers it is held."""

    name: str = Field(min_length=1, description="Hub id, local folder, .gguf file, or a packaged backbone's short name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Frozen weights and activations; auto is bfloat16 where the device computes in it"
    )
    quantization: Quantization = Field("none", description="Storage of the frozen linear layers")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="Attention implementation of transformers"
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id")
    remote_code: bool = Field(False, description="Run Python that ships with the model. Read it first")
    pickled_weights: bool = Field(False, description="Accept weights that are pickles, which can run code when loaded")


@dataclass(frozen=True, slots=True)
class Head:
    """What sits on the backbone: the language-model head it came with, or a new classification head."""

    kind: Literal["language", "classification"]
    labels: tuple[str, ...] = ()
    problem: Problem | None = None

    @property
    def num_outputs(self) -> int:
        """Columns of a classification head's logits: one a label, one alone for regression."""
        return 1 if self.problem == "regression" else len(self.labels)


LANGUAGE_HEAD = Head("language")
