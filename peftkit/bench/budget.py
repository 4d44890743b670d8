"""What a suite gives every method alike: training examples, tokens, seconds of training steps, or memory."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, model_validator

from peftkit.plan.cards import MEMORY
from peftkit.spec import Section

MemorySize = Annotated[str, Field(pattern=rf"(?i)^{MEMORY.pattern}$")]


class Budget(Section):
    """One of these, for every cell that trains. A prompting baseline uses none of them."""

    examples: PositiveInt | None = Field(None, description="Training examples seen, repeats included")
    tokens: PositiveInt | None = Field(None, description="Tokens trained on, without padding")
    seconds: PositiveInt | None = Field(None, description="Seconds of training steps; evaluation is not in it")
    memory: MemorySize | None = Field(
        None,
        description="Such as 8GiB: each cell gets the largest training.micro_batch that plans to fit, scoring with "
        "evaluation.batch_tokens included",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"takes exactly one of {known}; it has {', '.join(given) or 'none'}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe keys that hold a cell to it; memory is planned for, cell by cell."""
        counted = {"examples": self.examples, "tokens": self.tokens, "seconds": self.seconds}
        amounts = [f"{amount} {unit}" for unit, amount in counted.items() if amount is not None]
        return {"training.budget": amounts[0]} if amounts else {}
