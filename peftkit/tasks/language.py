"""What the token tasks share: next-token loss at labelled positions, perplexity, token accuracy, exact match.

Shapes: B examples, T tokens, P virtual tokens, H hidden, N labelled positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftkit.data.batching import Batch
from peftkit.data.chat import stop_token_carries_loss
from peftkit.data.features import IGNORED, Features
from peftkit.stats import bootstrap_scores
from peftkit.tasks.base import Prediction, Score


class LanguageTask:
    """Loss, predictions and metrics of a task whose target is tokens."""

    main_metric = "token_accuracy"
    selection_metric = "loss"
    metric_names: tuple[str, ...] = ("token_accuracy", "perplexity", "exact_match")
    lower_is_better = frozenset({"perplexity", "loss"})

    def inspect(self, features: Sequence[Features], tokenizer: Any) -> list[str]:
        if any(stop_token_carries_loss(np.asarray(feature.target), tokenizer) for feature in features):
            return []
        return [
            f"a stop token such as {tokenizer.eos_token!r} never carries loss, so the model will not learn to stop. "
            "Raise training.max_tokens, or give task.template a template that ends each answer with it."
        ]

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        logits_NV, target_N = labelled_logits(model, batch)
        return functional.cross_entropy(logits_NV.float(), target_N, reduction="sum", label_smoothing=smoothing)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        logits_NV, target_N = labelled_logits(model, batch)
        loss_N = functional.cross_entropy(logits_NV.float(), target_N, reduction="none")
        correct_N = logits_NV.argmax(-1) == target_N
        counts = (batch.target[:, 1:] != IGNORED).sum(1).tolist()
        parts = zip(batch.rows, counts, torch.split(loss_N, counts), torch.split(correct_N, counts), strict=True)
        return [
            {"row": row, "loss": float(loss.sum()), "tokens": count, "correct": int(correct.sum())}
            for row, count, loss, correct in parts
        ]

    def metrics(self, predictions: Sequence[Prediction], *, intervals: bool) -> dict[str, Score]:
        """Perplexity and token accuracy over labelled tokens; exact match: every token of the answer, its end included,
        is the likeliest one given those before it, which is when greedy decoding writes exactly the reference."""
        loss = np.array([p["loss"] for p in predictions])
        tokens = np.array([p["tokens"] for p in predictions])
        correct = np.array([p["correct"] for p in predictions])

        def scores(at: npt.NDArray[np.intp]) -> dict[str, float]:
            return {
                "token_accuracy": float(correct[at].sum() / tokens[at].sum()),
                "perplexity": math.exp(min(loss[at].sum() / tokens[at].sum(), 700.0)),
                "exact_match": float((correct[at] == tokens[at]).mean()),
            }

        bounds = bootstrap_scores(scores, len(predictions)) if intervals else {}
        found = {}
        for name, value in scores(np.arange(len(predictions))).items():
            low, high = bounds.get(name, (None, None))
            found[name] = Score(value, len(predictions), low, high)
        return found


def labelled_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and targets [N] where a token carries loss; the head never sees the other positions.

    The output embedding is fed only the hidden states [B, P + T, H] that predict a labelled token; P virtual tokens in
    front, which some methods add, are skipped.
    """
    labelled_BT = batch.target[:, 1:] != IGNORED
    length = batch.target.shape[1]

    def keep_labelled(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTH = args[0][:, args[0].shape[1] - length :]
        return (hidden_BTH[:, :-1][labelled_BT], *args[1:])

    output: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = output.register_forward_pre_hook(keep_labelled)
    try:
        logits_NV = model(**batch.inputs()).logits
    finally:
        handle.remove()
    return logits_NV, batch.target[:, 1:][labelled_BT]
