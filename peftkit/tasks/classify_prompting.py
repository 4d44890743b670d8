"""Classification without training: a causal backbone names the label, an encoder compares meanings.

Causal: the label whose words are likeliest after the prompt (Brown et al. 2020, arXiv:2005.14165), the mean over its
tokens. Encoder: cosine similarity of mean-pooled embeddings to the label's name, or, with demonstrations, to the mean
embedding of each label's demonstrations (nearest centroid).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from peftkit.backbones.load import Backbone
from peftkit.data.batching import Batch, collate, micro_batches
from peftkit.data.features import IGNORED, Features
from peftkit.data.table import Row, Table
from peftkit.errors import MethodError
from peftkit.tasks.base import Prediction
from peftkit.tasks.language import labelled_logits

if TYPE_CHECKING:
    from peftkit.tasks.classify import ClassifyTask

SCORING_TOKENS = 4096
SHARPNESS = 20.0
"""Scale of cosine similarities before the softmax that turns them into scores; it does not change the decision."""


@torch.no_grad()
def ask(
    task: ClassifyTask, backbone: Backbone, table: Table, demonstrations: Table, *, shots: int, max_tokens: int
) -> list[Prediction]:
    """One prediction a row from the untrained backbone.

    Raises:
        MethodError: for regression and multi-label problems, which have no prompt that is fair.
    """
    labels = task.labels
    if task.problem != "single_label_classification":
        raise MethodError(f"prompting baselines cannot answer {task.problem} problems. Use a method that trains.")
    if 0 < shots < len(labels) and backbone.dims.family == "encoder":
        raise MethodError(f"method.examples must be at least {len(labels)}, one for each label.")
    indices = {label: index for index, label in enumerate(labels)}
    shown = balanced(demonstrations, labels, shots)
    if backbone.dims.family == "encoder":
        scores = _by_similarity(backbone, table, shown, labels, max_tokens)
    else:
        scores = _by_likelihood(task.spec.prompt, backbone, table, shown, labels, max_tokens)
    return [task.prediction(i, row, indices[str(table.rows[i]["label"])]) for i, row in enumerate(scores)]


def balanced(table: Table, labels: Sequence[str], count: int) -> list[Row]:
    """`count` rows in table order, the labels taking turns, so that no label is favoured by order of appearance."""
    queues = {label: [row for row in table if str(row["label"]) == label] for label in labels}
    chosen: list[Row] = []
    for turn in range(count):
        queue = queues[labels[turn % len(labels)]]
        if queue:
            chosen.append(queue.pop(0))
    return chosen


def _by_likelihood(
    prompt: str, backbone: Backbone, table: Table, shown: Sequence[Row], labels: Sequence[str], max_tokens: int
) -> list[list[float]]:
    def filled(row: Row) -> str:
        return prompt.format(text=row["text"], text_pair=row["text_pair"] or "")

    preface = "".join(f"{filled(row)} {row['label']}\n\n" for row in shown)
    features = []
    for index, row in enumerate(table):
        asked = backbone.tokenizer(preface + filled(row), add_special_tokens=True)["input_ids"]
        for choice, label in enumerate(labels):
            answer = backbone.tokenizer(" " + label, add_special_tokens=False)["input_ids"]
            room = max_tokens * (1 + len(shown)) - len(answer)
            ids = [*asked[-room:], *answer]
            target = [IGNORED] * (len(ids) - len(answer)) + answer
            features.append(
                Features(np.array(ids, np.int32), np.array(target, np.int32), len(answer), index * len(labels) + choice)
            )
    likelihood = np.zeros((len(table), len(labels)))
    for batch in _batches(backbone, features):
        logits_NV, target_N = labelled_logits(backbone.model, batch)
        found = torch.log_softmax(logits_NV.float(), -1).gather(-1, target_N[:, None])[:, 0]
        counts = (batch.target[:, 1:] != IGNORED).sum(1).tolist()
        for place, part in zip(batch.rows, torch.split(found, counts), strict=True):
            likelihood[divmod(place, len(labels))] = float(part.mean())
    return torch.from_numpy(likelihood).softmax(-1).tolist()


def _by_similarity(
    backbone: Backbone, table: Table, shown: Sequence[Row], labels: Sequence[str], max_tokens: int
) -> list[list[float]]:
    def embed(texts: list[str]) -> Tensor:
        tokens = backbone.tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        features = [Features(np.array(ids, np.int32), 0, 1, index) for index, ids in enumerate(tokens)]
        vectors = torch.zeros(len(texts), backbone.dims.hidden)
        body = getattr(backbone.model, backbone.model.base_model_prefix)
        for batch in _batches(backbone, features):
            hidden_BTH = body(**batch.inputs()).last_hidden_state.float()
            mask_BT = batch.attention_mask if batch.attention_mask is not None else torch.ones_like(batch.input_ids)
            pooled = (hidden_BTH * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
            vectors[list(batch.rows)] = torch.nn.functional.normalize(pooled, dim=-1).cpu()
        return vectors

    def joined(row: Row) -> str:
        return row["text"] if row["text_pair"] is None else f"{row['text']} {row['text_pair']}"

    if shown:
        examples = embed([joined(row) for row in shown])
        given = [str(row["label"]) for row in shown]
        anchors = torch.stack(
            [examples[[i for i, name in enumerate(given) if name == label]].mean(0) for label in labels]
        )
        anchors = torch.nn.functional.normalize(anchors, dim=-1)
    else:
        anchors = embed(list(labels))
    similarity = embed([joined(row) for row in table]) @ anchors.T
    return (SHARPNESS * similarity).softmax(-1).tolist()


def _batches(backbone: Backbone, features: Sequence[Features]) -> list[Batch]:
    pad = backbone.tokenizer.pad_token_id or 0
    window = 512
    return [
        collate(group, pad).to(backbone.model.device)
        for start in range(0, len(features), window)
        for group in micro_batches(features[start : start + window], max_tokens=SCORING_TOKENS)
    ]
