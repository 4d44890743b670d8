"""The stages before training: read the data, then load the backbone and put the method on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import set_seed

from peftkit.backbones.dims import Dims
from peftkit.backbones.load import Backbone, dims_of, load_backbone, load_tokenizer
from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.data.load import load_splits
from peftkit.data.table import Splits, Table
from peftkit.methods.base import Adapted
from peftkit.recipe import Recipe
from peftkit.tasks import SHAPES, open_task, read_head
from peftkit.tasks.base import FeatureSet, Task
from peftkit.train.loop import Observer


@dataclass(frozen=True, slots=True)
class Read:
    """What is known of a run before any weight is loaded."""

    splits: Splits
    head: Head
    dims: Dims
    task: Task
    tokenizer: Any

    def encode(self, recipe: Recipe, table: Table, split: str, observer: Observer) -> FeatureSet:
        """Tokenize a split, and say loudly what was lost."""
        limit = recipe.training.max_tokens
        found = self.task.encode(table, self.tokenizer, self.dims, recipe.data, max_tokens=limit)
        troubles = {
            "were left out: too long, nothing that carries loss was left": found.dropped,
            "lost part of their answer to training.max_tokens": found.answer_cut,
            "were cut to training.max_tokens": found.truncated - found.answer_cut,
        }
        for trouble, count in troubles.items():
            if count:
                observer.say(f"warning: {count} of {len(table)} {split} examples {trouble} ({limit})")
        return found


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a run needs before its first step."""

    splits: Splits
    backbone: Backbone
    adapted: Adapted
    task: Task


def read(recipe: Recipe) -> Read:
    """Load the data, and check the method against the backbone's dimensions.

    Raises:
        InputError: faulty data, an unknown backbone, or a method that cannot work on it.
    """
    splits = load_splits(recipe.data, SHAPES[recipe.task.kind], seed=recipe.seed)
    head = read_head(recipe.task, splits.train)
    dims = dims_of(recipe.backbone, head)
    recipe.method.check(dims, recipe.task.kind, recipe.backbone.quantization)
    return Read(splits, head, dims, open_task(recipe.task, head), load_tokenizer(recipe.backbone))


def load(recipe: Recipe, found: Read, observer: Observer, *, device: torch.device) -> Prepared:
    """Load the backbone and attach the method.

    Raises:
        BackboneError: the weights cannot be loaded.
    """
    observer.say(f"loading {recipe.backbone.name}")
    set_seed(recipe.seed)
    backbone = load_backbone(
        recipe.backbone, head_to_load(recipe, found.head), device=device, dropout=recipe.training.dropout
    )
    backbone = replace(backbone, tokenizer=found.tokenizer)  # it may have the recipe's own chat template
    return Prepared(found.splits, backbone, recipe.method.attach(backbone), found.task)


def prepare(recipe: Recipe, observer: Observer, *, device: torch.device) -> Prepared:
    """Read, then load."""
    return load(recipe, read(recipe), observer, device=device)


def head_to_load(recipe: Recipe, head: Head) -> Head:
    """Prompting baselines ask a causal backbone in words, so they need the head that writes words."""
    if recipe.method.shots is None or dims_of(recipe.backbone, head).family == "encoder":
        return head
    return LANGUAGE_HEAD
