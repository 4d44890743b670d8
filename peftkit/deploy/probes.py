"""What two models are asked: a run's held-out prompts through its task, or built-in texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peftkit.backbones.spec import Head
from peftkit.data.features import IGNORED, Features
from peftkit.deploy.answers import POSITIONS, Probes

if TYPE_CHECKING:
    import torch

    from peftkit.backbones.dims import Dims
    from peftkit.data.table import Table
    from peftkit.recipe import Recipe
    from peftkit.tasks.base import Prediction

NUM_PROMPTS = 4
"""Prompts that continuations are written to."""
FIXED_ROWS, FIXED_TOKENS = 8, 48
"""Of the inputs that a model is asked when each forward reads it from disk."""
TEXTS = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "Question: How many days are there in a leap year?\nAnswer: A leap year has 366 days, one more than a common year.",
    "I did not expect to like this film, but the second half is so well acted that I watched it twice.",
    "Dear Ms. Okafor, thank you for your letter of 3 May. We are sorry that the parcel arrived late and damaged.",
    "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial(n - 1)\n",
    "Water boils at 100 degrees Celsius at sea level; on a high mountain it boils at a lower temperature.",
    "Once upon a time a fox lived at the edge of a dark wood, and every evening she counted the stars.",
    "To make bread you need flour, water, salt and yeast. Mix them, wait for the dough to rise, and bake it.",
    "The committee voted seven to two against the proposal, which critics had called vague and far too costly.",
    "Das Wetter ist heute schön. Il fait beau aujourd'hui. Hoy hace buen tiempo.",
)
"""What an adapter without a run is asked."""


def make_probes(recipe: Recipe | None, head: Head, tokenizer: Any, dims: Dims, max_examples: int) -> Probes:
    """The run's validation prompts, with its test prompts where these are few, and its metrics on test examples.

    Args:
        max_examples: examples that the task's metrics are measured on.

    Raises:
        DataError: the run's data are no longer what they were.
    """
    if recipe is None:
        features = _text_features(tokenizer, dims, head)
        return Probes(features, head, "the built-in prompts", _prompts(features, head))
    from peftkit.data.load import load_splits
    from peftkit.tasks import SHAPES, open_task

    splits = load_splits(recipe.data, SHAPES[recipe.task.kind], seed=recipe.seed)
    task = open_task(recipe.task, head)

    def encode(table: Table) -> list[Features]:
        return task.encode(table, tokenizer, dims, recipe.data, max_tokens=recipe.training.max_tokens).features

    held_out = {"validation": splits.validation, "test": splits.test}
    named = held_out if any(held_out.values()) else {"train": splits.train}
    asked: list[Features] = []
    used: list[str] = []
    for name, table in named.items():
        if table is not None and sum(feature.loss_units for feature in asked) < POSITIONS:
            asked += encode(table)
            used.append(name)
    origin = f"the {' and '.join(used)} split{'s'[: len(used) != 1]}"
    tested = encode(splits.test)[:max_examples] if splits.test is not None else []
    pad_id = int(tokenizer.pad_token_id or 0)

    def predict(model: torch.nn.Module) -> list[Prediction]:
        from peftkit.data.batching import collate, micro_batches

        device = next(model.parameters()).device
        batches = micro_batches(tested, max_tokens=recipe.evaluation.batch_tokens)
        return [row for batch in batches for row in task.predict(model, collate(batch, pad_id).to(device))]

    return Probes(asked, head, origin, _prompts(asked, head), predict=predict if len(tested) > 1 else None)


def fixed_inputs(probes: Probes) -> Probes:
    """The first of these questions cut to one length, so that one forward answers them all; nothing is written."""
    rows = sorted(probes.features, key=len, reverse=True)[:FIXED_ROWS]
    length = min(FIXED_TOKENS, len(rows[-1]))
    language = probes.head.kind == "language"
    features = []
    for number, row in enumerate(rows):
        ids = np.concatenate([row.input_ids[: length - 1], row.input_ids[-1:]])  # T5 and others read at the last token
        kinds = None if row.token_type_ids is None else row.token_type_ids[:length]
        target = np.concatenate([[IGNORED], ids[1:]]).astype(np.int32) if language else row.target
        features.append(Features(ids, target, length - 1 if language else 1, number, kinds))
    return Probes(features, probes.head, f"{len(features)} inputs of {length} tokens from {probes.origin}")


def _text_features(tokenizer: Any, dims: Dims, head: Head) -> list[Features]:
    features = []
    for row, text in enumerate(TEXTS):
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)[: dims.max_positions]
        language = head.kind == "language"
        features.append(Features(ids, ids if language else 0, len(ids) - 1 if language else 1, row))
    return features


def _prompts(features: Sequence[Features], head: Head) -> list[list[int]]:
    """What comes before the first answer; the first half of a text that is all answer."""
    prompts: list[list[int]] = []
    for feature in features if head.kind == "language" else ():
        labelled = np.flatnonzero(np.asarray(feature.target) != IGNORED)
        end = int(labelled[0]) if len(labelled) and labelled[0] > 0 else len(feature) // 2
        prompt = [int(token) for token in feature.input_ids[:end]]
        if prompt and prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == NUM_PROMPTS:
            break
    return prompts
