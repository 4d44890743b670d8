"""Sequence classification and regression, of texts or pairs of texts, on encoders and on causal backbones.

Shapes: B examples, P virtual tokens, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftkit.backbones.dims import Dims
from peftkit.backbones.load import Backbone
from peftkit.backbones.spec import Head, Problem
from peftkit.data.batching import Batch
from peftkit.data.features import Features
from peftkit.data.spec import DataSpec
from peftkit.data.table import Row, Table
from peftkit.errors import DataError, nearest
from peftkit.kernels.packed import real_rows
from peftkit.stats import bootstrap_counts, bootstrap_scores
from peftkit.tasks.base import EncodedExample, FeatureSet, Prediction, Score, encode_table
from peftkit.tasks.forward import logits_of
from peftkit.tasks.spec import Classify

PROBLEMS: dict[str, Problem] = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
METRIC_NAMES = {
    "single_label_classification": ("accuracy", "macro_f1", "micro_f1", "precision", "recall", "mcc"),
    "multi_label_classification": ("accuracy", "macro_f1", "micro_f1", "precision", "recall"),
    "regression": ("pearson", "rmse", "mae"),
}


class ClassifyTask:
    """A new head on the backbone, trained with the rest of what the method trains."""

    lower_is_better = frozenset({"loss", "rmse", "mae"})

    def __init__(self, spec: Classify, head: Head) -> None:
        self.spec = spec
        self.labels = head.labels
        self.problem = str(head.problem)
        self.metric_names = METRIC_NAMES[self.problem]
        self.main_metric = self.selection_metric = "pearson" if head.problem == "regression" else "accuracy"

    def encode(self, table: Table, tokenizer: Any, dims: Dims, data: DataSpec, *, max_tokens: int) -> FeatureSet:
        head = dims.head
        indices = {label: index for index, label in enumerate(head.labels)}
        texts = [row["text"] for row in table]
        pairs = [row["text_pair"] for row in table]
        if any(pair is not None for pair in pairs):
            tokens = tokenizer(texts, [pair or "" for pair in pairs], truncation=False)
        else:
            tokens = tokenizer(texts, truncation=False)
        limit = min(max_tokens, dims.max_positions or max_tokens)
        types = tokens.get("token_type_ids")

        def encode(index: int, row: Row) -> EncodedExample:
            ids, kinds = tokens["input_ids"][index], types[index] if types is not None else None
            overlong = len(ids) > limit
            if overlong:
                cut = tokenizer(row["text"], row["text_pair"], truncation=True, max_length=limit)
                ids, kinds = cut["input_ids"], cut.get("token_type_ids")
            target = _target(row["label"], head, indices, table.origins[index])
            segments = None if kinds is None else np.array(kinds, dtype=np.int32)
            return EncodedExample(Features(np.array(ids, dtype=np.int32), target, 1, index, segments), overlong, False)

        return encode_table(table, encode, data)

    def inspect(self, features: Sequence[Features], tokenizer: Any) -> list[str]:
        if self.problem != "single_label_classification":
            return []
        seen = {int(feature.target) for feature in features}
        return [f"label {name!r} has no training example" for i, name in enumerate(self.labels) if i not in seen]

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0, fused: bool = True) -> Tensor:
        """`fused` changes nothing: a few classes are no vocabulary, so the logits are small."""
        return self._losses(self._logits(model, batch), batch.target, smoothing).sum()

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        scores_BC, losses_B = self.measure(model, batch)
        return [
            self.prediction(row, scores, target) | {"loss": loss}
            for row, scores, target, loss in zip(
                batch.rows, scores_BC.tolist(), batch.target.tolist(), losses_B.tolist(), strict=True
            )
        ]

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores [B, C], probabilities or for regression the number itself, and losses [B]."""
        logits_BC = self._logits(model, batch)
        losses_B = self._losses(logits_BC, batch.target, 0.0)
        if self.problem == "regression":
            return logits_BC, losses_B
        if self.problem == "multi_label_classification":
            return logits_BC.sigmoid(), losses_B
        return logits_BC.softmax(-1), losses_B

    def prediction(self, row: int, scores: list[float], target: Any) -> Prediction:
        """The decision that scores [C] lead to: probabilities, or the number itself for regression."""
        if self.problem == "regression":
            decision: Any = scores[0]
        elif self.problem == "multi_label_classification":
            decision = [int(score > self.spec.threshold) for score in scores]
            target = [int(value) for value in target]
        else:
            decision = int(np.argmax(scores))
        return {"row": row, "label": target, "prediction": decision, "scores": [round(score, 6) for score in scores]}

    def _intervals(self, decided: npt.NDArray[Any], truth: npt.NDArray[Any]) -> dict[str, tuple[float, float]]:
        from peftkit.tasks.metrics import RegressionScores, scores_of_confusion, scores_of_label_sets

        if self.problem != "single_label_classification":
            score = RegressionScores.score if self.problem == "regression" else scores_of_label_sets
            return bootstrap_scores(lambda at: score(decided[at], truth[at]), len(truth))
        confusion_KK = np.zeros((len(self.labels), len(self.labels)), dtype=np.int64)
        np.add.at(confusion_KK, (truth, decided), 1)
        return bootstrap_counts(scores_of_confusion, confusion_KK)

    def _losses(self, logits_BC: Tensor, target: Tensor, smoothing: float) -> Tensor:
        """Each example's loss [B]: cross-entropy, squared error, or the mean over labels of binary cross-entropy."""
        if self.problem == "single_label_classification":
            return functional.cross_entropy(logits_BC, target, reduction="none", label_smoothing=smoothing)
        if self.problem == "regression":
            return (logits_BC[:, 0] - target.float()) ** 2
        softened_BC = target.float() * (1 - smoothing) + smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits_BC, softened_BC, reduction="none").mean(1)

    def prompt(
        self, backbone: Backbone, table: Table, demonstrations: Table, *, shots: int, data: DataSpec, max_tokens: int
    ) -> list[Prediction] | FeatureSet:
        from peftkit.tasks.classify_prompting import ask

        return ask(self, backbone, table, demonstrations, shots=shots, max_tokens=max_tokens)

    def metrics(self, predictions: Sequence[Prediction], *, intervals: bool) -> dict[str, Score]:
        from peftkit.tasks.metrics import SCORES  # brings libraries that only scoring needs

        scores = SCORES[self.problem]
        decided = np.array([p["prediction"] for p in predictions])
        truth = np.array([p["label"] for p in predictions])
        values = scores().compute(predictions=decided, references=truth)
        chance = {} if self.problem == "regression" else scores.score(_constant_answer(truth), truth)
        bounds = self._intervals(decided, truth) if intervals else {}
        found = {}
        for name, value in values.items():
            low, high = bounds.get(name, (None, None))
            found[name] = Score(value, len(truth), low, high, chance.get(name))
        return found

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, C] in float32. A causal backbone's are those at each example's last real token, wherever virtual
        tokens and padding put it; transformers alone would take the last position when it is fed embeddings."""
        if not _pools_last_token(model):
            return logits_of(model, batch).float()
        caught: list[Tensor] = []
        score = model.get_submodule(_score_path(model))
        handle = score.register_forward_hook(lambda module, args, output: caught.append(output))
        try:
            logits_of(model, batch)
        finally:
            handle.remove()
        if batch.segments is not None:
            return real_rows(caught[0], batch.segments.lengths)[0, batch.segments.ends()].float()
        offset = caught[0].shape[1] - batch.input_ids.shape[1]
        last_B = offset + batch.lengths - 1
        return caught[0][torch.arange(len(last_B)), last_B].float()


def read_head(spec: Classify, train: Table) -> Head:
    """The head for the labels of the recipe, or for those of the training split in sorted order.

    Raises:
        DataError: labels of mixed kinds, or only one label.
    """
    labels = [row["label"] for row in train]
    problem = _problem(spec, labels)
    if problem == "regression":
        return Head("classification", (), problem)
    several = problem == "multi_label_classification"
    seen = sorted({str(label) for given in labels for label in (given if several else [given])})
    names = tuple(spec.labels or seen)
    unnamed = [label for label in seen if label not in names]
    if unnamed:
        raise DataError(f"task.labels lacks {unnamed[0]!r}, which the training split has{nearest(unnamed[0], names)}.")
    if len(names) < 2 and not several:
        raise DataError(f"the training split has only one label, {names[0]!r}; there is nothing to learn.")
    return Head("classification", names, problem)


def assume_head(spec: Classify) -> Head:
    """The head before any data are read: the recipe's labels, or two of one kind."""
    problem = PROBLEMS.get(spec.problem, PROBLEMS["single-label"])
    return Head("classification", () if problem == "regression" else tuple(spec.labels or ("0", "1")), problem)


def _problem(spec: Classify, labels: list[Any]) -> Problem:
    if spec.problem != "auto":
        return PROBLEMS[spec.problem]
    kinds = {list if isinstance(label, list) else float if isinstance(label, float) else str for label in labels}
    if len(kinds) > 1:
        raise DataError("the training split mixes kinds of labels. Set task.problem to say what they are.")
    return {list: PROBLEMS["multi-label"], float: PROBLEMS["regression"]}.get(kinds.pop(), PROBLEMS["single-label"])


def _target(label: Any, head: Head, indices: dict[str, int], origin: str) -> Any:
    if head.problem == "regression":
        return float(label)
    given = label if head.problem == "multi_label_classification" else [label]
    unseen = [str(name) for name in given if str(name) not in indices]
    if unseen:
        raise DataError(
            f"{origin}: label {unseen[0]!r} does not occur in the training split{nearest(unseen[0], head.labels)}. "
            f"Known: {', '.join(head.labels)}. Correct the row, or name all labels in task.labels."
        )
    if head.problem == "single_label_classification":
        return indices[str(label)]
    vector = np.zeros(len(indices), dtype=np.float32)
    vector[[indices[str(name)] for name in given]] = 1.0
    return vector


def _constant_answer(truth: Any) -> Any:
    """What always giving the most frequent answer would predict."""
    answers, counts = np.unique(truth, axis=0, return_counts=True)
    return np.broadcast_to(answers[counts.argmax()], truth.shape)


def _pools_last_token(model: Any) -> bool:
    return any(name.rsplit(".", 1)[-1] == "score" for name, _ in model.named_modules())


def _score_path(model: Any) -> str:
    return next(str(name) for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] == "score")
