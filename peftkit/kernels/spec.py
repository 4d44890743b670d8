"""Which fast paths of the training step a recipe uses."""

from __future__ import annotations

from pydantic import Field

from peftkit.spec import Section


class Kernels(Section):
    """Fast paths. Each computes what the plain path computes, and each can be turned off to rule it out."""

    packing: bool = Field(True, description="Examples of a forward lie end to end, without padding (decoders)")
    attention: bool = Field(True, description="Attention by batched matrix products where that is faster, and packed")
    loss: bool = Field(True, description="Output layer and cross-entropy in one, in chunks, at labelled tokens")
    lora: bool = Field(True, description="Base and LoRA in one, sharing the input over query, key and value")
    layers: bool = Field(True, description="Norms, gated units and dropout that keep less and pass over memory less")
