"""A run's scores as functions of means over its test examples, so that any of them can be resampled and tested.

A smooth score is, up to terms of order 1/n, the mean of its own value plus each example's influence: the derivative of
the score by that example's weight (the infinitesimal jackknife, Jaeckel 1972). For accuracy that is exact: 0 or 1.

Shapes: N examples, U different examples, F columns, K labels, R resamples; `...` any of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import InputError
from peftkit.record import PREDICTIONS_NAME, RunRecord

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int64]

SHARES = frozenset({"accuracy", "macro_f1", "micro_f1", "precision", "recall", "token_accuracy", "exact_match"})
"""Scores from 0 to 1, whose differences are told in points: hundredths."""
AVERAGES = ("macro_f1", "precision", "recall")
FEW_COLUMNS = 5
"""Scores of so few columns are resampled themselves; of others the linear part is."""
STEP = 1e-5
KEPT_RUNS = 1024
AGREES = 1e-6
"""Predictions give their record's score up to this part of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """A function of the examples' means.

    Attributes:
        columns_UF: what is averaged, one row for each example that differs from the others.
        finish: takes means [..., F]; returns the score [...].
        places_N: each example's row; None where every example has its own.
    """

    columns_UF: Floats
    finish: Callable[[Floats], Floats]
    places_N: Integers | None = None

    def value(self) -> float:
        """The score of all examples."""
        return float(self.finish(self._means()))

    def values(self) -> Floats:
        """[N] values whose mean is the score: it plus the influences."""
        mean_F = self._means()
        apart_UF = self.columns_UF - mean_F
        influence_U = (self.finish(mean_F + STEP * apart_UF) - self.finish(mean_F - STEP * apart_UF)) / (2 * STEP)
        influence_N = influence_U if self.places_N is None else influence_U[self.places_N]
        values_N: Floats = self.value() + influence_N - influence_N.mean()
        return values_N

    @property
    def is_resampled(self) -> bool:
        """Whether resamples of the score itself are to be had, and differ from those of its values."""
        return self.places_N is None and 1 < self.columns_UF.shape[1] <= FEW_COLUMNS

    def resamples(self) -> Floats:
        """[R] scores of resampled examples."""
        import numpy as np

        from peftkit.stats.means import resampled_means

        mean_F = self._means()
        return self.finish(mean_F + resampled_means(self.columns_UF - mean_F).astype(np.float64))

    def _means(self) -> Floats:
        import numpy as np

        if self.places_N is None:
            mean_F: Floats = self.columns_UF.mean(axis=0)
            return mean_F
        share_U = np.bincount(self.places_N, minlength=len(self.columns_UF)) / len(self.places_N)
        return np.asarray(share_U @ self.columns_UF)


@dataclass(frozen=True, slots=True)
class Baseline:
    """What needs no model: guessing each label equally often, and always giving the most common one."""

    chance: float
    majority: float


@dataclass(frozen=True, slots=True)
class Test:
    """What must be equal for two runs to be compared in pairs.

    Attributes:
        kind: what is predicted.
        rows, content: numbers of the rows, and their labels or token counts, as bytes.
        answers: what the content is called.
    """

    kind: str
    rows: bytes
    content: bytes
    num_rows: int
    answers: str


@dataclass(frozen=True, slots=True, eq=False)
class RunScores:
    """A run's test examples, in the order of their rows.

    Attributes:
        scores: by metric.
        baselines: of a single-label problem, by metric.
    """

    test: Test
    scores: Mapping[str, Score]
    baselines: Mapping[str, Baseline]


def read_run_scores(folder: Path, record: RunRecord) -> RunScores:
    """The scores of a finished run's predictions. Those of the runs read last are kept.

    Raises:
        InputError: there are no predictions, they cannot be understood, or they are not those of the record.
    """
    path = folder / PREDICTIONS_NAME
    try:
        state = path.stat()
    except OSError as fault:
        raise InputError(f"{folder} has no {PREDICTIONS_NAME}: it was not scored on a test split.") from fault
    found = _read(path, state.st_mtime_ns, state.st_size)
    for name, metric in list(record.metrics.items())[:1]:
        value = found.scores[name].value() if name in found.scores else metric.value
        if abs(value - metric.value) > AGREES * max(1.0, abs(metric.value)):
            raise InputError(
                f"{path} gives {name} {value:.4g}, and the record says {metric.value:.4g}: they are of different runs. "
                "Run it again."
            )
    return found


@lru_cache(maxsize=KEPT_RUNS)
def _read(path: Path, changed_ns: int, size: int) -> RunScores:
    try:
        text = path.read_text(encoding="utf-8").strip()
        first = json.loads(text.split("\n", 1)[0])
        # a label's probabilities are most of the file, and no score reads them
        bare = re.sub(r'"scores": \[[^\]]*\](, )?', "", text).replace(", }", "}").replace("\n", ",")
        rows = sorted(json.loads(f"[{bare}]"), key=lambda row: int(row["row"]))
        return scores_of(rows, num_labels=len(first.get("scores", ())))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as fault:
        raise InputError(f"{path} holds no predictions that can be compared ({fault}). Score the run again.") from fault


def values_over_runs(runs: Sequence[RunScores], metrics: Sequence[str]) -> Floats:
    """[K, S, N] values of K metrics and S runs, whose means are the scores."""
    import numpy as np

    return np.array([[run.scores[metric].values() for run in runs] for metric in metrics])


def resamples_over_runs(runs: Sequence[RunScores], metric: str) -> Floats | None:
    """[R] means over the runs of resampled scores, the same examples in all; None where the values tell as much."""
    import numpy as np

    if not runs[0].scores[metric].is_resampled:
        return None
    return np.asarray(np.mean([run.scores[metric].resamples() for run in runs], axis=0))


def scores_of(rows: list[dict[str, Any]], *, num_labels: int) -> RunScores:
    """The scores of predictions, in the order of their rows."""
    import numpy as np

    def column(name: str, kind: type = np.int64) -> npt.NDArray[Any]:
        return np.asarray([row[name] for row in rows]).astype(kind)

    def test(kind: str, content: npt.NDArray[Any], answers: str = "labels") -> Test:
        return Test(kind, column("row").tobytes(), content.tobytes(), len(rows), answers)

    if "tokens" in rows[0]:
        tokens_N, correct_N = column("tokens"), column("correct")
        return RunScores(
            test("tokens", tokens_N, "token counts"), _of_tokens(column("loss", float), tokens_N, correct_N), {}
        )
    if isinstance(rows[0]["prediction"], list):
        truth_NK, given_NK = column("label"), column("prediction")
        return RunScores(test("label sets", truth_NK), _of_label_sets(truth_NK, given_NK), {})
    if isinstance(rows[0]["prediction"], float):
        numbers_N, answers_N = column("label", float), column("prediction", float)
        return RunScores(test("numbers", numbers_N), _of_numbers(numbers_N, answers_N), {})
    truth_N, given_N = column("label"), column("prediction")
    count = max(num_labels, int(truth_N.max()) + 1, int(given_N.max()) + 1)
    return RunScores(test("labels", truth_N), _of_labels(truth_N, given_N, count), _baselines(truth_N, count))


def _of_labels(truth_N: Integers, given_N: Integers, count: int) -> dict[str, Score]:
    """Those of `tasks.metrics.SingleLabelScores`."""
    import numpy as np

    hit_N1 = (truth_N == given_N)[:, None].astype(np.float64)
    pair_U, places_N = np.unique(truth_N * count + given_N, return_inverse=True)
    true_UK, given_UK = np.eye(count)[pair_U // count], np.eye(count)[pair_U % count]
    columns_UF = np.concatenate([true_UK * given_UK, given_UK, true_UK], axis=1)
    scores = dict.fromkeys(("accuracy", "micro_f1"), Score(hit_N1, _first))
    for metric in AVERAGES:
        scores[metric] = Score(columns_UF, partial(_average, metric=metric, over_present=True), places_N)
    return scores | {"mcc": Score(columns_UF, _matthews, places_N)}


def _of_label_sets(truth_NK: Integers, given_NK: Integers) -> dict[str, Score]:
    """Those of `tasks.metrics.MultiLabelScores`."""
    import numpy as np

    exact_N1 = (truth_NK == given_NK).all(axis=1)[:, None].astype(np.float64)
    hit_NK, either_NK = truth_NK * given_NK, truth_NK + given_NK
    columns_NF = np.concatenate([hit_NK, given_NK, truth_NK], axis=1).astype(np.float64)
    scores = {"accuracy": Score(exact_N1, _first)}
    for metric in AVERAGES:
        scores[metric] = Score(columns_NF, partial(_average, metric=metric, over_present=False))
    both_N2 = np.stack([2 * hit_NK.sum(axis=1), either_NK.sum(axis=1)], axis=1).astype(np.float64)
    return scores | {"micro_f1": Score(both_N2, _ratio)}


def _of_numbers(truth_N: Floats, given_N: Floats) -> dict[str, Score]:
    """Those of `tasks.metrics.RegressionScores`."""
    import numpy as np

    error_N = given_N - truth_N
    # standardised, so that their squares do not drown in those of the means; a correlation does not mind
    one_N, other_N = ((each - each.mean()) / (each.std() or 1.0) for each in (given_N, truth_N))
    moments_N5 = np.stack([one_N, other_N, one_N**2, other_N**2, one_N * other_N], axis=1)
    return {
        "pearson": Score(moments_N5, _correlation),
        "rmse": Score(error_N[:, None] ** 2, _root),
        "mae": Score(np.abs(error_N)[:, None], _first),
    }


def _of_tokens(loss_N: Floats, tokens_N: Integers, correct_N: Integers) -> dict[str, Score]:
    """Those of `tasks.language.LanguageTask`."""
    import numpy as np

    exact_N1 = (correct_N == tokens_N)[:, None].astype(np.float64)
    return {
        "token_accuracy": Score(np.stack([correct_N, tokens_N], axis=1).astype(np.float64), _ratio),
        "perplexity": Score(np.stack([loss_N, tokens_N], axis=1), _exponential),
        "exact_match": Score(exact_N1, _first),
    }


def _first(means: Floats) -> Floats:
    return means[..., 0]


def _root(means: Floats) -> Floats:
    import numpy as np

    return np.sqrt(np.maximum(means[..., 0], 0.0))


def _ratio(means: Floats) -> Floats:
    import numpy as np

    whole = means[..., 1]
    return np.divide(means[..., 0], whole, out=np.zeros_like(whole), where=whole > 0)


def _exponential(means: Floats) -> Floats:
    import numpy as np

    return np.exp(np.minimum(_ratio(means), 700.0))


def _correlation(means: Floats) -> Floats:
    import numpy as np

    one, other, one_squared, other_squared, product = (means[..., i] for i in range(5))
    spread = np.sqrt(np.maximum(0.0, (one_squared - one**2) * (other_squared - other**2)))
    return np.divide(product - one * other, spread, out=np.zeros_like(spread), where=spread > 1e-12)


def _average(means: Floats, *, metric: str, over_present: bool) -> Floats:
    """Mean over labels of hits over what they are out of; of shares of hits, answers and truths [..., 3 K]."""
    import numpy as np

    hit, given, true = np.split(means, 3, axis=-1)
    size = {"precision": given, "recall": true, "macro_f1": (given + true) / 2}[metric]
    label = np.divide(hit, size, out=np.zeros_like(hit), where=size > 0)
    labels = (given + true > 0).sum(axis=-1) if over_present else hit.shape[-1]
    return np.asarray(label.sum(axis=-1) / labels)


def _matthews(means: Floats) -> Floats:
    """Matthews' correlation, of shares of hits, answers and truths [..., 3 K]; 0 where it is undefined."""
    import numpy as np

    hit, given, true = np.split(means, 3, axis=-1)
    spread = (1 - (given**2).sum(axis=-1)) * (1 - (true**2).sum(axis=-1))
    covariance = hit.sum(axis=-1) - (given * true).sum(axis=-1)
    scale = np.sqrt(np.maximum(spread, 0.0))
    return np.asarray(np.divide(covariance, scale, out=np.zeros_like(spread), where=spread > 1e-12))


def _baselines(truth_N: Integers, count: int) -> dict[str, Baseline]:
    """Of each score of single labels. Guessing is scored by its expected confusion matrix."""
    import numpy as np

    share_K = np.bincount(truth_N, minlength=count) / len(truth_N)
    constant = _of_labels(truth_N, np.full_like(truth_N, share_K.argmax()), count)
    guess_F = np.concatenate([share_K / count, np.full(count, 1 / count), share_K])
    hits_F = np.array([1 / count])
    return {
        name: Baseline(float(score.finish(hits_F if score.places_N is None else guess_F)), score.value())
        for name, score in constant.items()
    }
