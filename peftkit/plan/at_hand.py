"""What of a recipe's data can be known before anything is fetched: labels, how many examples, how long they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peftkit.backbones.dims import Dims
from peftkit.backbones.load import is_on_disk, load_tokenizer
from peftkit.backbones.spec import Head
from peftkit.data.load import is_at_hand, load_splits
from peftkit.data.spec import DataSpec
from peftkit.data.table import Table
from peftkit.plan.sizes import sizes_of
from peftkit.plan.workload import Workload, workload_at_most, workload_of
from peftkit.recipe import Recipe
from peftkit.tasks import SHAPES, assume_head, open_task, read_head


@dataclass(frozen=True, slots=True)
class AtHand:
    """What was found.

    Attributes:
        head: that the task puts on the backbone; with two labels where neither recipe nor data name them.
        train: the training split; None where it would have to be fetched.
        num_scored: examples of the validation and the test split, by name; those that there are and that are at hand.
    """

    head: Head
    train: Table | None
    num_scored: Mapping[str, int]

    def workload(self, recipe: Recipe, dims: Dims) -> Workload:
        """The steps of the run: as long as the data are, where they and the tokenizer are at hand; else at most.

        Raises:
            DataError: the data are there and faulty.
        """
        if self.train is None:
            return workload_at_most(recipe, dims)
        if not is_on_disk(recipe.backbone):
            return workload_at_most(recipe, dims, num_examples=len(self.train))
        task = open_task(recipe.task, self.head)
        tokenizer, limit = load_tokenizer(recipe.backbone), recipe.training.max_tokens
        encoded = task.encode(self.train, tokenizer, dims, recipe.data, max_tokens=limit)
        return workload_of(recipe, sizes_of(encoded.features))


def look(recipe: Recipe) -> AtHand:
    """Read the training split if it is on this disk, and the labels.

    Raises:
        DataError: the data are there and faulty.
    """
    if not _is_local(recipe.data):
        return AtHand(assume_head(recipe.task), None, {})
    splits = load_splits(recipe.data, SHAPES[recipe.task.kind], seed=recipe.seed)
    scored = {"validation": splits.validation, "test": splits.test}
    counts = {name: len(table) for name, table in scored.items() if table is not None}
    return AtHand(read_head(recipe.task, splits.train), splits.train, counts)


def _is_local(data: DataSpec) -> bool:
    sources = [source for source in (data.train, data.validation, data.test) if isinstance(source, str)]
    return all(map(is_at_hand, sources))
