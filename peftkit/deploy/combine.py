"""Many adapters become one: an ordinary LoRA adapter, a report of what was lost, and scores beside its parts'."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from peftkit import __version__
from peftkit.deploy.adapter import INSIDE
from peftkit.deploy.beside import Beside, choose_beside
from peftkit.deploy.exams import Exam, ScoreRow, cost, open_exams, score_adapter, seen_in_training
from peftkit.deploy.mixing import How, Ingredient, Mix, Mixed, Space, highest_rank, mix
from peftkit.deploy.parts import (
    DOWN,
    UP,
    Adapter,
    check_same_base,
    deltas_through_base,
    read_adapter,
    require_free,
    saved_modules,
    write_adapter,
)
from peftkit.deploy.weight_search import Search, search_weights
from peftkit.errors import BackboneError, InputError, MethodError
from peftkit.files import staged_folder, write_json
from peftkit.recipe import Recipe
from peftkit.record import Part

REPORT_NAME = "combine_report.json"
TRIALS = 30


class CombinedPart(Part):
    """One part. `rank` is its largest; absent where the method has none."""

    name: str
    path: str
    digest: str
    method: str
    rank: int | None = None
    weight: float


class CombineReport(Part):
    """What was combined, how, and what it costs.

    `error` is the norm of what is missing over the norm of the exact result, over all modules, and `module_errors` the
    same for each: what the rank cuts off, or in factors the products of different parts. `costs` says of each task by
    how much the combination is worse than each part alone, in the metric's unit.
    """

    peftkit_version: str
    how: How
    space: Space
    density: float | None = None
    seed: int | None = None
    rank: int
    parts: tuple[CombinedPart, ...]
    base: str | None
    base_digest: str | None = None
    head: str
    notes: tuple[str, ...] = ()
    modules: int
    error: float | None = None
    module_errors: dict[str, float]
    scores: tuple[ScoreRow, ...] = ()
    test_scores: tuple[ScoreRow, ...] = ()
    costs: dict[str, dict[str, float]] = Field(default_factory=dict)
    search: Search | None = None
    wall_seconds: float


@dataclass(frozen=True, slots=True)
class _Kitchen:
    """What every combination of the same parts needs."""

    adapters: Sequence[Adapter]
    names: Sequence[str]
    parts: Sequence[Ingredient]
    head: str | None
    dtype: torch.dtype

    def mixed(self, how: Mix, least_rank: int = 1) -> Mixed:
        return mix(self.parts, how, dtype=self.dtype, least_rank=least_rank)

    def beside(self, weights: Sequence[float]) -> Beside:
        return choose_beside(self.adapters, self.head, weights)

    def write(self, folder: Path, tensors: Mapping[str, Tensor], rank: int, beside: Beside) -> None:
        config = _config(self.adapters, beside, sorted({path for part in self.parts for path in part.deltas}), rank)
        identity = self.adapters[0].identity
        write_adapter(folder, config, tensors, head=beside.head, origin=beside.origin, identity=identity)


def combine(
    paths: Sequence[str | Path],
    out: str | Path,
    how: Mix,
    *,
    head: str | None = None,
    on: Sequence[Recipe] | None = None,
    trials: int | None = None,
    base: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> CombineReport:
    """Combine the adapters of runs or adapter folders into the folder `out`; return the report that is written there.

    `out` appears whole or not at all. No base is loaded but to score, and for parts that are no plain LoRA.

    Args:
        head: whose head and saved modules the combination gets: a part's path, its number from 1, or `mean`.
        on: recipes to score on, on their validation splits; none when empty; the parts' own when None.
        trials: search so many weights on the validation splits instead of taking those of `how`.
        base: the base's name, where the adapters don't know it or it has moved.
        say: told what is being done.

    Raises:
        InputError: parts that cannot be combined, a setting that makes no sense, an output in use.
    """
    started, out = time.perf_counter(), Path(out).absolute()
    require_free(out)
    how = how.settled(len(paths), searched=trials is not None)
    kitchen, notes = _prepare(paths, head, base)
    beside = kitchen.beside(how.weights or ())
    own = [adapter.recipe for adapter in kitchen.adapters if adapter.recipe is not None]
    exams, unscored = open_exams(own if on is None else on, required=on is not None)
    notes += (*unscored, *seen_in_training(exams, own))
    try:
        rows = _score_parts(kitchen, exams, base, say)
    except BackboneError as fault:
        raise BackboneError(f"{fault} To combine without scores, which needs no base: --no-score.") from fault
    search = None
    if trials is not None:
        how, search = _search(kitchen, how, exams, rows, trials=trials, base=base, say=say)
        beside = kitchen.beside(how.weights or ())
    say(f"combining {len(paths)} adapters: {how.how}")
    mixed = kitchen.mixed(how)
    with staged_folder(out) as staging:
        kitchen.write(staging, _tensors(mixed, beside), mixed.rank, beside)
        result = [score_adapter(staging, exams, name=how.how, split="validation", base=base)] if exams else []
        tests = _score_tests(kitchen, exams, staging, how, base) if search is not None else []
        report = CombineReport(
            peftkit_version=__version__,
            how=how.how,
            space=how.space,
            density=how.density,
            seed=how.seed if search or how.how.startswith("dare") else None,
            rank=mixed.rank,
            parts=_described(kitchen, how),
            base=kitchen.adapters[0].base_name,
            base_digest=(kitchen.adapters[0].identity or {}).get("weights_digest"),
            head=beside.told,
            notes=notes,
            modules=len(mixed.factors),
            error=mixed.error,
            module_errors=dict(mixed.errors),
            scores=(*rows, *result),
            test_scores=tuple(tests),
            costs=_costs(rows, result[0]) if result else {},
            search=search,
            wall_seconds=time.perf_counter() - started,
        )
        write_json(staging / REPORT_NAME, report.model_dump(mode="json", exclude_none=True))
    return report


def _prepare(paths: Sequence[str | Path], head: str | None, base: str | None) -> tuple[_Kitchen, tuple[str, ...]]:
    """The parts, known to be of one base, and what is to be said about that."""
    adapters = [read_adapter(path) for path in paths]
    for adapter in adapters:
        if adapter.config.is_prompt_learning:
            raise MethodError(
                f"{adapter.path} is a {adapter.config.peft_type.value} adapter: it puts trained virtual tokens before "
                "the input and changes no weight, so there is nothing to add up. Train with method=lora."
            )
    notes = check_same_base(adapters)
    transposed = {bool(getattr(adapter.config, "fan_in_fan_out", False)) for adapter in adapters}
    if len(transposed) > 1:
        raise InputError("the parts disagree on fan_in_fan_out, so they belong to different kinds of layers.")
    names = _distinct([adapter.name for adapter in adapters])
    parts = []
    for name, adapter in zip(names, adapters, strict=True):
        plain = adapter.impurity is None
        if not plain:
            notes.append(f"{name}: {adapter.impurity}; its deltas are the folded weights less the base's")
        deltas = adapter.products() if plain else deltas_through_base(adapter, base)
        if not deltas:
            raise MethodError(f"{adapter.path} changes no linear layer, so there is nothing to add up.")
        unscaled = adapter.unscaled if plain else {}
        scalings = {path: adapter.scaling(path) for path in unscaled}
        parts.append(Ingredient(name, adapter.digest, deltas, unscaled, scalings))
    dtypes = [tensor.dtype for adapter in adapters for tensor in adapter.tensors.values() if tensor.is_floating_point()]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return _Kitchen(adapters, names, parts, head, dtype), tuple(dict.fromkeys(notes))


def _score_parts(
    kitchen: _Kitchen, exams: Sequence[Exam], base: str | None, say: Callable[[str], None]
) -> list[ScoreRow]:
    """What each part scores alone; nothing without a task."""
    rows = []
    for name, adapter in zip(kitchen.names, kitchen.adapters, strict=True):
        if exams:
            say(f"scoring {name} alone on {', '.join(exam.label for exam in exams)}")
            rows.append(score_adapter(adapter.path, exams, name=name, split="validation", base=base))
    return rows


def _search(
    kitchen: _Kitchen,
    how: Mix,
    exams: Sequence[Exam],
    rows: Sequence[ScoreRow],
    *,
    trials: int,
    base: str | None,
    say: Callable[[str], None],
) -> tuple[Mix, Search]:
    if not exams:
        raise InputError("--search needs a task with data.validation: give runs as parts, or a recipe with --on.")
    rank = highest_rank(kitchen.parts, how)

    def build(weights: Sequence[float]) -> dict[str, Tensor]:
        weighed = replace(how, weights=tuple(weights))
        return _tensors(kitchen.mixed(weighed, least_rank=rank), kitchen.beside(weights))

    def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        kitchen.write(folder, tensors, rank, kitchen.beside(how.weights or ()))

    found = search_weights(how, rows, exams, build=build, write=write, trials=trials, base=base, say=say)
    return found.mix, found.search


def _score_tests(kitchen: _Kitchen, exams: Sequence[Exam], staging: Path, how: Mix, base: str | None) -> list[ScoreRow]:
    """Parts and combination on the test splits: the validation splits chose the weights, and flatter them."""
    tested = [exam for exam in exams if exam.splits["test"] is not None]
    if not tested:
        return []
    entries = [(name, adapter.path) for name, adapter in zip(kitchen.names, kitchen.adapters, strict=True)]
    return [
        score_adapter(path, tested, name=name, split="test", base=base) for name, path in [*entries, (how.how, staging)]
    ]


def _costs(rows: Sequence[ScoreRow], result: ScoreRow) -> dict[str, dict[str, float]]:
    return {
        label: {row.name: cost(score, row.scores[label]) for row in rows if label in row.scores}
        for label, score in result.scores.items()
    }


def _described(kitchen: _Kitchen, how: Mix) -> tuple[CombinedPart, ...]:
    return tuple(
        CombinedPart(
            name=name,
            path=str(adapter.path),
            digest=adapter.digest,
            method=adapter.method,
            rank=max((factors.rank for factors in part.unscaled.values()), default=None),
            weight=weight,
        )
        for name, adapter, part, weight in zip(
            kitchen.names, kitchen.adapters, kitchen.parts, how.weights or (), strict=True
        )
    )


def _tensors(mixed: Mixed, beside: Beside) -> dict[str, Tensor]:
    """Everything the file holds, by the names that PEFT reads."""
    ups = {INSIDE + path + UP: factors.up_OR for path, factors in mixed.factors.items()}
    downs = {INSIDE + path + DOWN: factors.down_RI for path, factors in mixed.factors.items()}
    return {**ups, **downs, **beside.saved}


def _config(adapters: Sequence[Adapter], beside: Beside, paths: Sequence[str], rank: int) -> Any:
    """A plain LoRA of scaling 1; the parts' own targets where they all say the same, whole paths otherwise."""
    from peft import LoraConfig

    first = beside.origin.config
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    said = [{key: getattr(adapter.config, key, None) for key in keys} for adapter in adapters]
    agreed = all(each == said[0] for each in said) and all(adapter.impurity is None for adapter in adapters)
    return LoraConfig(
        task_type=first.task_type,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        fan_in_fan_out=bool(getattr(first, "fan_in_fan_out", False)),
        modules_to_save=saved_modules(first) or None,
        base_model_name_or_path=adapters[0].config.base_model_name_or_path,
        revision=adapters[0].config.revision,
        inference_mode=True,
        **(said[0] if agreed else {"target_modules": list(paths)}),
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where two are the same."""
    return [
        name if list(names).count(name) == 1 else f"{name} #{list(names)[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]
