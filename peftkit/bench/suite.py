"""A suite: one recipe, and what varies over it. It expands into cells, one recipe each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, TypeAdapter, ValidationError, field_validator

from peftkit.bench.budget import Budget
from peftkit.bench.tuning import Settings, Tune, middle
from peftkit.errors import InputError, RecipeError, nearest
from peftkit.methods import ALIASES, AnyMethod
from peftkit.recipe import Recipe, anchor, build_recipe, parse_yaml, read_yaml, set_value
from peftkit.report.comparison import is_reference
from peftkit.spec import Section
from peftkit.units import parse_seconds

Chosen = Mapping[str, Settings]
"""Variant, as a table calls it -> what tuning chose for it."""
LONGEST_LABEL = 60


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a suite.

    Attributes:
        name: of its folder: variant, seed and recipe digest.
        variant: what a table calls it; cells that differ in the seed alone share it.
    """

    name: str
    variant: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Point:
    """A cell before its recipe is checked.

    Attributes:
        name: of the variant alone, as the suite's `variants` has it.
        variant: with its place on the grid, as a table calls it.
        varied: the dotted keys of variant and grid.
        content: recipe data.
    """

    name: str
    variant: str
    seed: int
    varied: Settings
    content: Settings


class Suite(Section):
    """What a benchmark runs: every variant at every point of the grid with every seed."""

    name: str = Field(min_length=1)
    description: str = Field("", description="For people: what is compared, and how the settings were chosen")
    recipe: Settings = Field(description="The recipe that the cells share: a path, or the recipe itself")
    variants: dict[Annotated[str, Field(min_length=1)], Settings] = Field({}, description="Name -> dotted keys it sets")
    grid: dict[str, Annotated[list[Any] | dict[str, Any], Field(min_length=1)]] = Field(
        {}, description="Dotted key -> values, or their names -> values; all combined"
    )
    seeds: list[NonNegativeInt] = Field([0], min_length=1)
    exclude: list[Annotated[Settings, Field(min_length=1)]] = Field(
        [], description="Cells left out: variant, seed or dotted keys, all of which must match"
    )
    always: Settings = Field({}, description="Dotted keys of every cell, above variants and grid")
    budget: Budget | None = Field(None, description="The same amount of one thing for every cell that trains")
    tune: Tune | None = Field(None, description="The same number of trials for every variant that trains")
    reference: str | None = Field(
        None, description="The variant that the report compares the others with, each at its own place of a grid"
    )
    timeout: PositiveFloat | None = Field(None, description="Of one cell: seconds, or as in 90s, 30m, 1h30m")
    inference: bool = Field(True, description="Measure after each run how fast it answers; adds seconds to a cell")
    target_score: float | None = Field(None, description="Report how long training takes to this validation score")

    @field_validator("variants", mode="before")
    @classmethod
    def _plain_variants(cls, variants: Any) -> Any:
        """`full:` without settings is the recipe as it stands."""
        return {k: {} if v is None else v for k, v in variants.items()} if isinstance(variants, dict) else variants

    @field_validator("timeout", mode="before")
    @classmethod
    def _in_seconds(cls, timeout: Any) -> Any:
        """`30m` is 1800."""
        return parse_seconds(timeout) if isinstance(timeout, str) else timeout

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} names a seed twice")
        return seeds

    def cells(self, chosen: Chosen | None = None) -> list[Cell]:
        """Every run, in the order of variants, grid and seeds.

        Args:
            chosen: what tuning found; None, before it, takes the middle of every space.

        Raises:
            RecipeError: the faults of all cells, each named once.
        """
        points, faults = self._included(chosen)
        faults += tuning_faults(self, points)
        cells: list[Cell] = []
        for point in points:
            try:
                cells.append(_cell(point))
            except RecipeError as fault:
                faults += [(point.variant, text) for text in fault.faults]
        faults += _repeated(cells)
        names = list(dict.fromkeys(cell.variant for cell in cells))
        if cells and not faults and self.reference is not None and not is_reference(self.reference, names):
            known = f"{', '.join(names)}{nearest(self.reference, names)}"
            faults.append(("reference", f"no {self.reference!r} among {known}"))
        if not points and not faults:
            faults.append(("exclude", "leaves no cell to run"))
        if faults:
            raise RecipeError(f"suite {self.name!r}", _gathered(faults, {point.variant for point in points}))
        return cells

    def tuned_points(self) -> list[Point]:
        """One point of each variant that is tuned, which are those that train."""
        return [] if self.tune is None else tuned_among(self._included(None)[0])

    def trial(self, point: Point, values: Settings, hurdles: Mapping[int, float] | None = None) -> Recipe:
        """The recipe of a trial of a tuned point: with these values, and nothing to test on.

        Raises:
            RecipeError: faults of the recipe.
        """
        assert self.tune is not None
        metric = {} if self.tune.metric == "auto" else {"evaluation.metric": self.tune.metric}
        hurdle = {"evaluation.hurdles": dict(hurdles)} if hurdles else {}
        content = self._content(point.varied, {**self.tune.trial, **metric, **values, **hurdle})
        _apply(content, {"data.test": None, "seed": self.tune.seed})
        return build_recipe(content)

    def _included(self, chosen: Chosen | None) -> tuple[list[Point], list[tuple[str, str]]]:
        """Points that no exclusion matches, and the exclusions that match none."""
        points = list(self._points(chosen))
        matches = [{i for i, point in enumerate(points) if _is_excluded(point, rule)} for rule in self.exclude]
        left_out = set().union(*matches)
        idle = [rule for rule, matched in zip(self.exclude, matches, strict=True) if not matched]
        return (
            [point for i, point in enumerate(points) if i not in left_out],
            [("exclude", f"{rule} matches no cell. Check its keys and values, or remove it") for rule in idle],
        )

    def _points(self, chosen: Chosen | None) -> Iterator[Point]:
        names: Sequence[str] = list(self.variants) or [""]
        for name, labelled in itertools.product(names, itertools.product(*map(_labelled, self.grid.values()))):
            place = {key: value for key, (_, value) in zip(self.grid, labelled, strict=True)}
            labels = {key: label for key, (label, _) in zip(self.grid, labelled, strict=True)}
            varied = {**self.variants.get(name, {}), **place}
            label = ", ".join([name] * bool(name) + _grid_labels(place, labels))
            searched = {} if self.tune is None else middle(self.tune.space_of(name))
            content = self._content(varied, searched if chosen is None else chosen.get(label, {}))
            for seed in self.seeds:
                yield Point(name, label, seed, varied, {**content, "seed": seed})

    def _content(self, varied: Settings, searched: Settings) -> Settings:
        """Recipe data of one point: the shared recipe, what varies, the budget, what is searched, what always holds."""
        content = dict(self.recipe)
        budget = {} if self.budget is None else self.budget.settings
        _apply(content, {**varied, **budget, **searched, **self.always})
        if not _prompting(content.get("method")):
            return content
        # The shared training settings are for the methods that train; only a prompting variant's own would be ignored.
        content = {key: value for key, value in self.recipe.items() if key != "training"}
        training = self.recipe.get("training")
        if isinstance(training, Mapping) and "max_tokens" in training:
            content["training"] = {"max_tokens": training["max_tokens"]}
        shared = {
            key: v for key, v in self.always.items() if key.split(".")[0] != "training" or key == "training.max_tokens"
        }
        _apply(content, {**varied, **shared})
        return content


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite file. An override sets a suite key (`seeds=[0]`), else one of every recipe (`training.epochs=1`).

    Paths are taken from the folder of the suite where they exist there; those in a recipe file, from the recipe's.

    Raises:
        InputError: a file is missing or is not YAML.
        RecipeError: the suite's own faults, all named at once.
    """
    path = Path(path)
    content = read_yaml(path)
    folder = path.parent.absolute()
    if isinstance(content.get("recipe"), str):
        beside = folder / content["recipe"]
        chosen = beside if beside.is_file() else Path(content["recipe"])
        content["recipe"] = anchor(read_yaml(chosen), chosen.parent.absolute())
    elif isinstance(content.get("recipe"), dict):
        content["recipe"] = anchor(content["recipe"], folder)
    always = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{override!r} is not an override. Write key.sub=value, for example training.epochs=1.")
        value = parse_yaml(text, where=f"override {override!r}")
        if key.split(".")[0].strip() in Suite.model_fields:
            set_value(content, key.strip(), value)
        else:
            always[key.strip()] = value
    if always:
        content["always"] = {**(content.get("always") or {}), **always}
    return build_suite(content, where=str(path))


def build_suite(content: Mapping[str, Any], *, where: str = "suite") -> Suite:
    """A checked suite from plain data whose recipe is a mapping.

    Raises:
        RecipeError: one or more faults, all named at once.
    """
    try:
        return Suite.model_validate(content)
    except ValidationError as fault:
        raise RecipeError(where, [_explain(error) for error in fault.errors()]) from None


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(where, list(Suite.model_fields))}"
    if error["type"] == "missing":
        return f"{where}: is required"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]} (it is {error['input']!r})"


def _apply(content: Settings, settings: Settings) -> None:
    """Set dotted keys, whole sections before what is inside them; a section set to null is left to its defaults."""
    for key, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
        if value is None and "." not in key:
            content.pop(key, None)
        else:
            set_value(content, key, value)


def _cell(point: Point) -> Cell:
    recipe = build_recipe(point.content)
    return named_cell(point.variant or recipe.label, recipe)


def named_cell(variant: str, recipe: Recipe) -> Cell:
    """The cell of a variant that runs this recipe."""
    return Cell(f"{slug_of(variant)}-seed{recipe.seed}-{recipe.digest[:8]}", variant, recipe)


def slug_of(variant: str) -> str:
    """The variant's name as a folder can have it."""
    return re.sub(r"[^\w.=+-]+", "-", variant, flags=re.ASCII).strip("-.")[:LONGEST_LABEL] or "cell"


def _labelled(values: list[Any] | dict[str, Any]) -> list[tuple[str | None, Any]]:
    """The values of a grid's key, each with the name that the suite gives it."""
    return list(values.items()) if isinstance(values, dict) else [(None, value) for value in values]


def _grid_labels(place: Settings, labels: Mapping[str, str | None]) -> list[str]:
    """`lora`, `rank=8`: the shortest words that tell the points of a grid apart."""
    last = [key.rsplit(".", 1)[-1] for key in place]
    return [
        labels[key]
        or (
            str(value)
            if isinstance(value, str) and key in ("method", "method.kind", "backbone", "backbone.name", "task")
            else f"{short if last.count(short) == 1 else key}={_short(value)}"
        )
        for (key, value), short in zip(place.items(), last, strict=True)
    ]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_excluded(point: Point, rule: Settings) -> bool:
    named = {"variant": point.variant, "seed": point.seed}
    return all(named[key] == value if key in named else _holds(point, key, value) for key, value in rule.items())


def _holds(point: Point, key: str, value: Any) -> bool:
    """Whether the point sets `key` to `value`; a bare word also matches the kind or name of a section."""
    if key in point.varied and point.varied[key] == value:
        return True
    found: Any = point.content
    for part in key.split("."):
        if isinstance(found, str) and part in ("kind", "name"):
            continue
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and isinstance(value, str):
        return value in (found.get("kind"), found.get("name"))
    return bool(found == value)


def _repeated(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Cells whose recipe an earlier one has already."""
    first: dict[str, Cell] = {}
    faults = []
    for cell in cells:
        earlier = first.setdefault(cell.recipe.digest, cell)
        if earlier is not cell:
            faults.append((cell.variant, f"is the same run as {earlier.variant!r}. Remove one, or exclude it"))
    return faults


def _gathered(faults: Sequence[tuple[str, str]], variants: set[str]) -> list[str]:
    """One line a fault, with the variants that have it."""
    holders: dict[str, dict[str, None]] = {}
    for variant, text in faults:
        holders.setdefault(text, {})[variant] = None
    return [
        text
        if len(variants) > 1 and set(names) == variants
        else f"{'; '.join(name or 'recipe' for name in names)}: {text}"
        for text, names in holders.items()
    ]


def tuned_among(points: Sequence[Point]) -> list[Point]:
    """One point of each variant that trains."""
    return list({point.variant: point for point in points if not _prompting(point.content.get("method"))}.values())


def tuning_faults(suite: Suite, points: Sequence[Point]) -> list[tuple[str, str]]:
    """What keeps the suite's points from being tuned, by variant; trials are checked at the ends of their space."""
    tune = suite.tune
    if tune is None:
        return []
    faults = [("tune", text) for text in tune.strangers(list(suite.variants))]
    if tune.seed in suite.seeds:
        faults.append(("tune", f"tune.seed {tune.seed} is one of the suite's seeds {suite.seeds}. Take a fresh one"))
    for point in tuned_among(points):
        fixed = dict.fromkeys(point.varied, "the variant or the grid") | dict.fromkeys(suite.always, "an override")
        found = tune.faults(point.name, fixed)
        for values in [] if found else tune.ends(point.name):
            try:
                recipe = suite.trial(point, values)
            except RecipeError as fault:
                found += fault.faults
                continue
            if recipe.data.validation is None:
                found.append("tune: needs data.validation to score trials on")
            if recipe.evaluation.every == "never":
                found.append("tune: evaluation.every is never, so trials have no score. Set it in tune.trial")
        faults += [(point.variant, text) for text in dict.fromkeys(found)]
    return faults


def _prompting(method: Any) -> bool:
    """Whether this `method` section trains nothing. A faulty one counts as training: its faults are told later."""
    content = {"kind": method} if isinstance(method, str) else method
    if not isinstance(content, dict) or content.get("kind") in ALIASES:
        return False
    try:
        return _method_adapter().validate_python(content).shots is not None
    except (ValidationError, InputError):
        return False


@cache
def _method_adapter() -> TypeAdapter[AnyMethod]:
    return TypeAdapter(AnyMethod)
