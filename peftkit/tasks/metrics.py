"""Classification and regression scores, as `evaluate.Metric` classes over scikit-learn, none of them from a hub."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import sklearn
from sklearn import metrics as sk

LABEL = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
LABELS = datasets.Features(
    {
        "predictions": datasets.Sequence(datasets.Value("int64")),
        "references": datasets.Sequence(datasets.Value("int64")),
    }
)
NUMBER = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")})


class _Scores(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """A metric that returns several scores at once and keeps its buffer in memory."""

    features: datasets.Features

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__), citation="", inputs_description="", features=self.features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return self.score(np.asarray(predictions), np.asarray(references))

    @staticmethod
    def score(predictions: npt.NDArray[Any], references: npt.NDArray[Any]) -> dict[str, float]:
        raise AssertionError("each metric says how it scores")


class SingleLabelScores(_Scores):
    """Accuracy, macro precision, recall and F1, micro F1, and Matthews' correlation over class indices [n]."""

    features = LABEL

    @staticmethod
    def score(predictions: npt.NDArray[Any], references: npt.NDArray[Any]) -> dict[str, float]:
        with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):
            precision, recall, f1, _ = sk.precision_recall_fscore_support(
                references, predictions, average="macro", zero_division=0.0
            )
            varied = len(np.union1d(predictions, references)) > 1
            return {
                "accuracy": float((predictions == references).mean()),
                "macro_f1": float(f1),
                "micro_f1": float((predictions == references).mean()),
                "precision": float(precision),
                "recall": float(recall),
                "mcc": float(sk.matthews_corrcoef(references, predictions)) if varied else 0.0,
            }


def scores_of_confusion(counts_RKK: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """The scores of `SingleLabelScores` for R confusion matrices at once: rows are truth, columns what was given.

    Labels that neither occur nor are given in a matrix do not count in its macro averages, as in scikit-learn.
    """
    total_R = counts_RKK.sum(axis=(1, 2)).astype(np.float64)
    hit_RK = np.diagonal(counts_RKK, axis1=1, axis2=2).astype(np.float64)
    given_RK, true_RK = counts_RKK.sum(axis=1).astype(np.float64), counts_RKK.sum(axis=2).astype(np.float64)
    present_R = ((given_RK + true_RK) > 0).sum(axis=1)
    precision_RK, recall_RK = hit_RK / np.maximum(given_RK, 1), hit_RK / np.maximum(true_RK, 1)
    f1_RK = 2 * hit_RK / np.maximum(given_RK + true_RK, 1)
    covariance_R = hit_RK.sum(1) * total_R - (given_RK * true_RK).sum(1)
    spread_R = np.sqrt((total_R**2 - (given_RK**2).sum(1)) * (total_R**2 - (true_RK**2).sum(1)))
    accuracy_R = hit_RK.sum(1) / total_R
    return {
        "accuracy": accuracy_R,
        "macro_f1": f1_RK.sum(1) / present_R,
        "micro_f1": accuracy_R,
        "precision": precision_RK.sum(1) / present_R,
        "recall": recall_RK.sum(1) / present_R,
        "mcc": np.divide(covariance_R, spread_R, out=np.zeros_like(spread_R), where=spread_R > 0),
    }


class MultiLabelScores(_Scores):
    """Exact-set accuracy, and precision, recall and F1 over multi-hot vectors [n, num_labels]."""

    features = LABELS

    @staticmethod
    def score(predictions: npt.NDArray[Any], references: npt.NDArray[Any]) -> dict[str, float]:
        with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):
            precision, recall, macro, _ = sk.precision_recall_fscore_support(
                references, predictions, average="macro", zero_division=0.0
            )
            micro = sk.f1_score(references, predictions, average="micro", zero_division=0.0)
            return {
                "accuracy": float((predictions == references).all(axis=1).mean()),
                "macro_f1": float(macro),
                "micro_f1": float(micro),
                "precision": float(precision),
                "recall": float(recall),
            }


def scores_of_label_sets(predictions: npt.NDArray[Any], references: npt.NDArray[Any]) -> dict[str, float]:
    """The scores of `MultiLabelScores` for multi-hot vectors [n, num_labels], in a few array operations."""
    hit_C = (predictions & references).sum(axis=0)
    given_C, true_C = predictions.sum(axis=0), references.sum(axis=0)
    return {
        "accuracy": float((predictions == references).all(axis=1).mean()),
        "macro_f1": float((2 * hit_C / np.maximum(given_C + true_C, 1)).mean()),
        "micro_f1": float(2 * hit_C.sum() / max(given_C.sum() + true_C.sum(), 1)),
        "precision": float((hit_C / np.maximum(given_C, 1)).mean()),
        "recall": float((hit_C / np.maximum(true_C, 1)).mean()),
    }


class RegressionScores(_Scores):
    """Pearson's correlation, root mean squared error and mean absolute error over numbers [n]."""

    features = NUMBER

    @staticmethod
    def score(predictions: npt.NDArray[Any], references: npt.NDArray[Any]) -> dict[str, float]:
        error = predictions - references
        spread = predictions.std() * references.std()
        centred = (predictions - predictions.mean()) * (references - references.mean())
        return {
            "pearson": float(centred.mean() / spread) if spread > 0 else 0.0,
            "rmse": float(np.sqrt((error**2).mean())),
            "mae": float(np.abs(error).mean()),
        }


SCORES = {
    "single_label_classification": SingleLabelScores,
    "multi_label_classification": MultiLabelScores,
    "regression": RegressionScores,
}
"""By the problem of a head."""
