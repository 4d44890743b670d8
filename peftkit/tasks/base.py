"""What a task owns: features, loss, predictions and metrics. The loop knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from peftkit.backbones.dims import Dims
from peftkit.backbones.load import Backbone
from peftkit.data.batching import Batch
from peftkit.data.chat import ExampleFault
from peftkit.data.features import Features
from peftkit.data.spec import DataSpec
from peftkit.data.table import Row, Table
from peftkit.errors import DataError

Prediction = dict[str, Any]
"""What one example's score is computed from, as plain data: its `row`, its summed `loss`, and what the task adds."""


@dataclass(frozen=True, slots=True)
class Score:
    """A metric with its 95 % bootstrap interval over `n` examples, and what a constant answer would score."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    chance: float | None = None


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The encoded examples of a split, and what was lost on the way.

    Attributes:
        features: in table order, unusable examples left out.
        truncated: examples cut to the longest length.
        answer_cut: those of them that lost some of what carries the loss.
        dropped: examples left out because nothing that carries loss was left, or by `data.overlong: drop`.
    """

    features: list[Features]
    truncated: int = 0
    answer_cut: int = 0
    dropped: int = 0


class Task(Protocol):
    """The runtime of one task spec. `B` examples a batch."""

    main_metric: str
    selection_metric: str
    metric_names: tuple[str, ...]
    lower_is_better: frozenset[str]

    def encode(self, table: Table, tokenizer: Any, dims: Dims, data: DataSpec, *, max_tokens: int) -> FeatureSet:
        """Tokenize a split.

        Raises:
            DataError: an example that cannot be used, with its place; or none that can.
        """
        ...

    def inspect(self, features: Sequence[Features], tokenizer: Any) -> list[str]:
        """Warnings about a training split that would teach something other than what is meant."""
        ...

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0, fused: bool = True) -> Tensor:
        """The summed loss over the batch's loss units, in float32, differentiable.

        Args:
            fused: output layer and loss in one where the model allows it, without holding the logits; the same loss.
        """
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """One prediction an example, from one forward without gradients."""
        ...

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """What `predict` reads its predictions from, still on the device."""
        ...

    def prompt(
        self, backbone: Backbone, table: Table, demonstrations: Table, *, shots: int, data: DataSpec, max_tokens: int
    ) -> list[Prediction] | FeatureSet:
        """How the untrained backbone is asked: predictions, or features for `predict` with demonstrations in front."""
        ...

    def metrics(self, predictions: Sequence[Prediction], *, intervals: bool) -> dict[str, Score]:
        """Scores over a whole split; with `intervals`, each with its 95 % bootstrap interval."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One example's features, and what its truncation cost."""

    features: Features
    truncated: bool
    answer_cut: bool


def encode_table(table: Table, encode: Callable[[int, Row], EncodedExample], data: DataSpec) -> FeatureSet:
    """Encode every row, treating overlong ones as the recipe says.

    Raises:
        DataError: a row that cannot be encoded; an overlong one with `data.overlong: error`; no row with loss left.
    """
    kept: list[Features] = []
    truncated = answer_cut = dropped = 0
    for index, row in enumerate(table):
        try:
            example = encode(index, row)
        except ExampleFault as fault:
            raise DataError(f"{table.origins[index]}: {fault}") from fault
        if example.truncated and data.overlong == "error":
            raise DataError(
                f"{table.origins[index]}: longer than training.max_tokens. "
                "Raise it, or set data.overlong to truncate or drop."
            )
        if example.features.loss_units == 0 or (example.truncated and data.overlong == "drop"):
            dropped += 1
            continue
        truncated += example.truncated
        answer_cut += example.answer_cut
        kept.append(example.features)
    if not kept:
        raise DataError(
            f"no example of {table.origins[0].rsplit(':', 1)[0]} has a token that carries loss within "
            "training.max_tokens: all labels are masked. Raise training.max_tokens, or look at `peftkit data`."
        )
    return FeatureSet(kept, truncated, answer_cut, dropped)
