"""Adapters scored on a recipe's task: the same examples for each, through the task's own metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from peftkit.backbones.load import Backbone, load_backbone
from peftkit.backbones.spec import Head
from peftkit.data.features import Features
from peftkit.data.load import load_splits
from peftkit.data.table import Table
from peftkit.deploy.adapter import check_base, read_source
from peftkit.errors import InputError, nearest
from peftkit.methods.base import Adapted, load_peft
from peftkit.recipe import Recipe
from peftkit.record import Metric, Part
from peftkit.tasks import SHAPES, open_task, read_head
from peftkit.train.scoring import mean_loss, predict

if TYPE_CHECKING:
    from peftkit.tasks.base import Task

Split = Literal["validation", "test"]


class TaskScore(Part):
    """What one adapter scores on one task: the metric that decides, and all the others."""

    metric: str
    value: float
    lower_is_better: bool
    n: int
    loss: float
    metrics: dict[str, Metric]


class ScoreRow(Part):
    """A line of the table: an adapter, and its score on each task that its head can answer."""

    name: str
    scores: dict[str, TaskScore]


@dataclass(frozen=True, slots=True)
class Exam:
    """One task with its examples.

    Attributes:
        label: the task's kind and its data, as the table's column says it.
        metric: the one that decides; `loss`, or one of the task's.
    """

    label: str
    recipe: Recipe
    head: Head
    task: Task
    splits: dict[Split, Table | None]
    metric: str

    def encode(self, backbone: Backbone, split: Split) -> list[Features]:
        """The split's examples in the backbone's tokens."""
        table, recipe = self.splits[split], self.recipe
        assert table is not None, "asked for a split that is not there"
        limit = recipe.training.max_tokens
        return self.task.encode(table, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=limit).features

    def score(
        self, adapted: Adapted, backbone: Backbone, features: Sequence[Features], *, intervals: bool = True
    ) -> TaskScore:
        """Every metric of a model on encoded examples."""
        pad_id = int(backbone.tokenizer.pad_token_id or 0)
        found = predict(adapted, self.task, features, pad_id=pad_id, max_tokens=self.recipe.evaluation.batch_tokens)
        metrics = {
            name: Metric(**asdict(score)) for name, score in self.task.metrics(found, intervals=intervals).items()
        }
        loss = mean_loss(found, features)
        return TaskScore(
            metric=self.metric,
            value=loss if self.metric == "loss" else metrics[self.metric].value,
            lower_is_better=self.metric in self.task.lower_is_better,
            n=len(found),
            loss=loss,
            metrics=metrics,
        )


def open_exams(recipes: Sequence[Recipe], *, required: bool) -> tuple[list[Exam], list[str]]:
    """The different tasks that recipes ask for, each once, and why some could not be opened.

    Args:
        required: refuse a recipe that cannot be scored on, instead of leaving it out.

    Raises:
        InputError: faulty data, or no validation split, where one is required.
    """
    exams: dict[str, Exam] = {}
    notes = []
    for recipe in recipes:
        asked = {"task": recipe.task, "data": recipe.data}
        key = json.dumps({name: section.model_dump(mode="json") for name, section in asked.items()}, sort_keys=True)
        if key in exams:
            continue
        label = _unused(f"{recipe.task.kind} {_data_name(recipe)}", [exam.label for exam in exams.values()])
        try:
            exams[key] = _open_exam(recipe, label)
        except InputError as fault:
            if required:
                raise
            notes.append(f"not scored on {label}: {fault}")
    return list(exams.values()), notes


def _open_exam(recipe: Recipe, label: str) -> Exam:
    splits = load_splits(recipe.data, SHAPES[recipe.task.kind], seed=recipe.seed)
    if splits.validation is None:
        raise InputError("its recipe has no data.validation. Set it: a file, or a fraction of train.")
    head = read_head(recipe.task, splits.train)
    task = open_task(recipe.task, head)
    metric = task.selection_metric if recipe.evaluation.metric == "auto" else recipe.evaluation.metric
    known = ("loss", *task.metric_names)
    if metric not in known:
        raise InputError(
            f"evaluation.metric: this task has no {metric!r}{nearest(metric, known)}. It has: {', '.join(known)}."
        )
    return Exam(label, recipe, head, task, {"validation": splits.validation, "test": splits.test}, metric)


def seen_in_training(exams: Sequence[Exam], recipes: Sequence[Recipe]) -> list[str]:
    """Warnings about validation rows that another recipe has trained on: a fraction is drawn by the recipe's seed."""
    return [
        f"{exam.label}: its validation split is drawn from the training data by seed {exam.recipe.seed}; a part that "
        "was trained with another seed has seen some of it, and its score flatters it"
        for exam in exams
        if isinstance(exam.recipe.data.validation, float)
        and any(each.data == exam.recipe.data and each.seed != exam.recipe.seed for each in recipes)
    ]


@dataclass(frozen=True, slots=True)
class Seated:
    """An adapter on its base, ready to be asked."""

    backbone: Backbone
    adapted: Adapted
    head: Head


def seat(path: Path, base: str | None) -> Seated:
    """Load a run or an adapter onto its base, on the GPU where there is one.

    Raises:
        InputError: the base cannot be loaded, or is not the adapter's.
    """
    source = read_source(path, base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(source.spec, source.head, device=device)
    check_base(source, backbone)
    return Seated(backbone, load_peft(backbone, source.adapter), source.head)


def score_adapter(path: Path, exams: Sequence[Exam], *, name: str, split: Split, base: str | None = None) -> ScoreRow:
    """One adapter on every exam that its head can answer."""
    seated = seat(path, base)
    scores = {
        exam.label: exam.score(seated.adapted, seated.backbone, exam.encode(seated.backbone, split))
        for exam in exams
        if exam.head == seated.head and exam.splits[split] is not None
    }
    return ScoreRow(name=name, scores=scores)


def cost(score: TaskScore, alone: TaskScore) -> float:
    """By how much the first is worse than the second, in the metric's own unit; negative where it is better."""
    return score.value - alone.value if score.lower_is_better else alone.value - score.value


def best_of(rows: Sequence[ScoreRow], label: str) -> tuple[str, TaskScore] | None:
    """The row that does best on a task, and its score there."""
    scored = [(row.name, row.scores[label]) for row in rows if label in row.scores]
    return min(scored, key=lambda item: cost(item[1], scored[0][1])) if scored else None


def _data_name(recipe: Recipe) -> str:
    """`mpqa` for `builtin:mpqa`, a file's or folder's name for a path."""
    source = recipe.data.train.removeprefix("builtin:").rstrip("/")
    return Path(source).stem if "/" in source else source


def _unused(label: str, used: Sequence[str]) -> str:
    number = 2
    while label in used:
        label = f"{label.removesuffix(f' #{number - 1}')} #{number}"
        number += 1
    return label
