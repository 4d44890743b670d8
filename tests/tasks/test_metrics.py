"""Scores against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from peftkit.tasks.classify import METRIC_NAMES
from peftkit.tasks.metrics import (
    SCORES,
    MultiLabelScores,
    RegressionScores,
    SingleLabelScores,
    scores_of_confusion,
    scores_of_label_sets,
)


def test_the_names_a_task_promises_are_those_it_scores() -> None:
    pairs = {
        "single_label_classification": [0, 1],
        "multi_label_classification": [[0, 1], [1, 0]],
        "regression": [0.5, 1.0],
    }
    for problem, values in pairs.items():
        found = SCORES[problem]().compute(predictions=values, references=values)
        assert tuple(found) == METRIC_NAMES[problem]


def test_single_label_scores() -> None:
    # truth a a b b, given a b b b: precision a 1/1, b 2/3; recall a 1/2, b 2/2; F1 a 2/3, b 4/5.
    found = SingleLabelScores().compute(predictions=[0, 1, 1, 1], references=[0, 0, 1, 1])
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["mcc"] == pytest.approx(matthews_corrcoef([0, 0, 1, 1], [0, 1, 1, 1]))


def test_micro_f1_of_one_label_each_is_accuracy() -> None:
    found = SingleLabelScores().compute(predictions=[0, 2, 1, 1, 0], references=[0, 1, 1, 2, 0])
    assert found["micro_f1"] == pytest.approx(found["accuracy"]) == pytest.approx(3 / 5)


def test_multi_label_scores() -> None:
    found = MultiLabelScores().compute(predictions=[[1, 0], [1, 1]], references=[[1, 0], [0, 1]])
    assert found["accuracy"] == pytest.approx(1 / 2)  # the whole set must be right
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 0))


def test_scores_of_label_sets_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    given, truth = rng.integers(0, 2, (20, 4)), rng.integers(0, 2, (20, 4))
    given[:, 3] = 0  # a label that is never given
    assert scores_of_label_sets(given, truth) == pytest.approx(MultiLabelScores.score(given, truth))


def test_regression_scores() -> None:
    found = RegressionScores().compute(predictions=[1.0, 2.0, 4.0], references=[2.0, 3.0, 5.0])
    assert found["pearson"] == pytest.approx(1.0)
    assert found["rmse"] == pytest.approx(1.0)
    assert found["mae"] == pytest.approx(1.0)


def test_a_constant_answer_has_no_correlation() -> None:
    assert RegressionScores.score(np.array([1.0, 1.0]), np.array([0.0, 2.0]))["pearson"] == 0.0


def test_scores_of_a_confusion_matrix_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        truth, given = rng.integers(0, 4, 30), rng.integers(0, 3, 30)  # label 3 is never given
        confusion = np.zeros((1, 5, 5), dtype=np.int64)  # label 4 never occurs
        np.add.at(confusion[0], (truth, given), 1)
        expected = SingleLabelScores.score(given, truth)
        found = scores_of_confusion(confusion)
        assert {name: float(values[0]) for name, values in found.items()} == pytest.approx(expected)
