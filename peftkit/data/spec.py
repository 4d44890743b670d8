"""The `data` section of a recipe. Imports no torch and no datasets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from peftkit.spec import Section

Source = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "classification"]
Split = Literal["train", "validation", "test"]


class Limit(Section):
    """At most so many examples of a split: the first ones after a shuffle that depends on the data alone."""

    train: PositiveInt | None = None
    validation: PositiveInt | None = None
    test: PositiveInt | None = None


class DataSpec(Section):
    """Where the examples come from. A source is PATH | HUB_ID | builtin:NAME; a path may be a file, folder or glob."""

    train: Source
    validation: Source | Fraction | None = Field(None, description="A source, or the fraction of train to hold out")
    test: Source | None = None
    format: Format = "auto"
    columns: dict[str, str] = Field(
        {}, description="{text, text_pair, label} | {messages} | {prompt, completion}: your names"
    )
    limit: Limit = Limit()
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="Examples longer than training.max_tokens; whatever loses its answer is reported"
    )
