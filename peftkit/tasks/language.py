"""What the token tasks share: next-token loss at labelled positions, perplexity, token accuracy, exact match.

Shapes: B examples, T tokens, P virtual tokens, H hidden, N labelled positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftkit.data.batching import Batch
from peftkit.data.chat import stop_token_carries_loss
from peftkit.data.features import IGNORED, Features
from peftkit.kernels.loss import read_head
from peftkit.kernels.packed import real_rows
from peftkit.stats import bootstrap_scores
from peftkit.tasks.base import Prediction, Score
from peftkit.tasks.forward import logits_of


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

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0, fused: bool = True) -> Tensor:
        head = read_head(model) if fused else None
        if head is None:
            logits_NV, target_N = labelled_logits(model, batch)
            return functional.cross_entropy(logits_NV.float(), target_N, reduction="sum", label_smoothing=smoothing)
        hidden_NH, target_N = labelled_hidden(model, batch, head.output)
        return head.loss(hidden_NH, target_N, smoothing=smoothing)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        counts = _labelled_counts(batch)
        loss_N, correct_N = self.measure(model, batch)
        parts = zip(batch.rows, counts, torch.split(loss_N, counts), torch.split(correct_N, counts), strict=True)
        return [
            {"row": row, "loss": float(loss.sum()), "tokens": count, "correct": int(correct.sum())}
            for row, count, loss, correct in parts
        ]

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and correctness [N] of each labelled token."""
        head = read_head(model)
        if head is not None:
            return head.scores(*labelled_hidden(model, batch, head.output))
        logits_NV, target_N = labelled_logits(model, batch)
        loss_N = functional.cross_entropy(logits_NV.float(), target_N, reduction="none")
        return loss_N, logits_NV.argmax(-1) == target_N

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
    keep, target_N = _selection(batch)

    def keep_labelled(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (keep(args[0]), *args[1:])

    output: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = output.register_forward_pre_hook(keep_labelled)
    try:
        logits_NV = logits_of(model, batch)
    finally:
        handle.remove()
    return logits_NV, target_N


def labelled_hidden(model: nn.Module, batch: Batch, output: nn.Module) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] that predict a labelled token, and targets [N]; the output layer does not run."""
    keep, target_N = _selection(batch)
    kept: list[Tensor] = []

    def stash(hidden_BTH: Tensor) -> Tensor:
        kept.append(keep(hidden_BTH))
        return hidden_BTH.new_empty((*hidden_BTH.shape[:-1], 0))

    with _forward_replaced(output, stash):
        logits_of(model, batch)
    (hidden_NH,) = kept
    return hidden_NH, target_N


def _selection(batch: Batch) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What keeps, of hidden states [B, P + T, H], those [N, H] before a labelled token; and the labels [N]."""
    labelled_BT = batch.target[:, 1:] != IGNORED
    # sized beforehand: asking the device how many there are would make the host wait for it
    row_N, position_N = torch.nonzero_static(labelled_BT, size=batch.loss_units).unbind(1)

    def keep(hidden_BTH: Tensor) -> Tensor:
        if batch.segments is not None:
            hidden_BTH = real_rows(hidden_BTH, batch.segments.lengths)
        virtual = hidden_BTH.shape[1] - batch.target.shape[1]
        return hidden_BTH[row_N, virtual + position_N]

    return keep, batch.target[row_N, position_N + 1]


def _labelled_counts(batch: Batch) -> list[int]:
    """Labelled tokens of each example."""
    labelled_BT = batch.target[:, 1:] != IGNORED
    if batch.cu_lengths is None:
        counts: list[int] = labelled_BT.sum(1).tolist()
    else:
        before = functional.pad(labelled_BT[0].cumsum(0), (2, 0))  # labelled tokens before each one, and in all
        counts = before[batch.cu_lengths.long()].diff().tolist()
    return counts


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
