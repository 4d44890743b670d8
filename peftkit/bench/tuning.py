"""The `tune` section of a suite: how many trials every method gets, over which values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from peftkit.errors import nearest
from peftkit.spec import Section

Settings = dict[str, Any]


class Range(Section):
    """Numbers from `low` to `high`; whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="Spread over orders of magnitude")

    @model_validator(mode="after")
    def _runs_upwards(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high (they are {self.low} and {self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 on a logarithmic scale (it is {self.low})")
        return self

    @property
    def whole(self) -> bool:
        """Whether it is of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def middle(self) -> int | float:
        """Halfway on its scale."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(middle) if self.whole else middle


Values = Range | Annotated[list[Any], Field(min_length=1)]
Space = dict[str, Values]
"""Dotted recipe key -> the values it may take."""


class Tune(Section):
    """Every variant that trains gets the same number of trials over its own space, scored on validation data alone."""

    trials: PositiveInt = 4
    metric: str = Field("auto", description="A metric of the task, or loss; auto is what the recipe keeps the best by")
    seed: NonNegativeInt = Field(1000, description="Of the search and of every trial; none of the suite's own")
    space: Space = Field({}, description="Dotted key -> {low, high, log} or a list, of every variant")
    spaces: dict[str, dict[str, Values | None]] = Field(
        {}, description="Variant -> its own keys above the shared ones; null takes a key away"
    )
    trial: Settings = Field({}, description="Dotted keys of trials alone, such as a smaller training.budget")
    prune_after: PositiveInt | None = Field(
        2, description="Trials of a variant after which one below their median at the same scoring stops; null: never"
    )

    def space_of(self, variant: str) -> Space:
        """What is searched for a variant, by the name it has under `variants`."""
        found = {**self.space, **self.spaces.get(variant, {})}
        return {key: values for key, values in found.items() if values is not None}

    def ends(self, variant: str) -> list[Settings]:
        """Points of the variant's space to check a recipe at: the middle, then the ends of each key by turns."""
        space = self.space_of(variant)
        ends = {key: [v.low, v.high] if isinstance(v, Range) else v for key, v in space.items()}
        return [middle(space), *(middle(space) | {key: end} for key, found in ends.items() for end in found)]

    def faults(self, variant: str, fixed: Mapping[str, str]) -> list[str]:
        """What is wrong with the variant's space.

        Args:
            fixed: dotted keys that the suite itself sets for it -> where.
        """
        space = self.space_of(variant)
        found = [
            f"tune: {key} is searched, and {where} sets it. Leave one out"
            for key, where in fixed.items()
            if key in space
        ]
        if not space:
            found.append("tune: has nothing to search. Give tune.space a key, such as training.learning_rate")
        points = math.prod(math.inf if isinstance(values, Range) else len(values) for values in space.values())
        if space and points < self.trials:
            found.append(
                f"tune: its space has {points} points for {self.trials} trials. Add values, or lower tune.trials"
            )
        return found

    def strangers(self, variants: list[str]) -> list[str]:
        """Faults of spaces that no variant has."""
        return [
            f"tune.spaces: no variant {name!r}{nearest(name, variants)}" for name in self.spaces if name not in variants
        ]


def middle(space: Space) -> Settings:
    """The point halfway along every key."""
    places = {key: middle_place(values) for key, values in space.items()}
    return {key: place if isinstance(v := space[key], Range) else v[int(place)] for key, place in places.items()}


def middle_place(values: Values) -> int | float:
    """The middle of a range, or the place of a list's middle; of two, the first."""
    return values.middle if isinstance(values, Range) else (len(values) - 1) // 2
