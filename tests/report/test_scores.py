"""Scores as means over examples: against the tasks' own scores, leave-one-out, and a plain bootstrap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import record
from sklearn import metrics as sk

from peftkit.errors import InputError
from peftkit.files import write_json_lines
from peftkit.record import Metric
from peftkit.report.scores import RunScores, read_run_scores, resamples_over_runs, values_over_runs
from peftkit.stats.bootstrap import bootstrap_statistic
from peftkit.stats.means import mean_over_seeds

RNG = np.random.default_rng(0)
N = 400
TRUTH = RNG.choice(4, N, p=[0.5, 0.3, 0.15, 0.05])
GIVEN = np.where(RNG.random(N) < 0.7, TRUTH, RNG.integers(0, 4, N))
SETS = RNG.integers(0, 2, (N, 3))
GIVEN_SETS = np.where(RNG.random((N, 3)) < 0.8, SETS, 1 - SETS)
NUMBERS = RNG.normal(100.0, 2.0, N)
ANSWERS = NUMBERS + RNG.normal(0.5, 1.5, N)
TOKENS = RNG.integers(1, 60, N)
CORRECT = RNG.binomial(TOKENS, 0.8)
LOSS = TOKENS * RNG.gamma(2.0, 0.6, N)

LABEL_ROWS = [
    {"row": i, "label": int(a), "prediction": int(b)} for i, (a, b) in enumerate(zip(TRUTH, GIVEN, strict=True))
]
SET_ROWS = [
    {"row": i, "label": a.tolist(), "prediction": b.tolist()}
    for i, (a, b) in enumerate(zip(SETS, GIVEN_SETS, strict=True))
]
NUMBER_ROWS = [
    {"row": i, "label": float(a), "prediction": float(b)} for i, (a, b) in enumerate(zip(NUMBERS, ANSWERS, strict=True))
]
TOKEN_ROWS = [
    {"row": i, "loss": float(a), "tokens": int(b), "correct": int(c)}
    for i, (a, b, c) in enumerate(zip(LOSS, TOKENS, CORRECT, strict=True))
]


def f1(i: Any) -> float:
    return float(sk.f1_score(TRUTH[i], GIVEN[i], average="macro"))


def mcc(i: Any) -> float:
    return float(sk.matthews_corrcoef(TRUTH[i], GIVEN[i]))


def precision(i: Any) -> float:
    return float(sk.precision_score(TRUTH[i], GIVEN[i], average="macro", zero_division=0.0))


def recall(i: Any) -> float:
    return float(sk.recall_score(TRUTH[i], GIVEN[i], average="macro", zero_division=0.0))


def set_f1(i: Any) -> float:
    return float(sk.f1_score(SETS[i], GIVEN_SETS[i], average="macro"))


def set_micro_f1(i: Any) -> float:
    return float(sk.f1_score(SETS[i], GIVEN_SETS[i], average="micro"))


def pearson(i: Any) -> float:
    return float(np.corrcoef(NUMBERS[i], ANSWERS[i])[0, 1])


def rmse(i: Any) -> float:
    return float(np.sqrt(((ANSWERS[i] - NUMBERS[i]) ** 2).mean()))


def token_accuracy(i: Any) -> float:
    return float(CORRECT[i].sum() / TOKENS[i].sum())


def perplexity(i: Any) -> float:
    return float(np.exp(LOSS[i].sum() / TOKENS[i].sum()))


CASES: list[tuple[list[dict[str, Any]], str, Callable[[Any], float]]] = [
    (LABEL_ROWS, "accuracy", lambda i: float((TRUTH[i] == GIVEN[i]).mean())),
    *((LABEL_ROWS, s.__name__.replace("f1", "macro_f1"), s) for s in (f1, mcc, precision, recall)),
    (SET_ROWS, "accuracy", lambda i: float((SETS[i] == GIVEN_SETS[i]).all(axis=1).mean())),
    (SET_ROWS, "macro_f1", set_f1),
    (SET_ROWS, "micro_f1", set_micro_f1),
    *((NUMBER_ROWS, s.__name__, s) for s in (pearson, rmse)),
    (NUMBER_ROWS, "mae", lambda i: float(np.abs(ANSWERS[i] - NUMBERS[i]).mean())),
    *((TOKEN_ROWS, s.__name__, s) for s in (token_accuracy, perplexity)),
    (TOKEN_ROWS, "exact_match", lambda i: float((CORRECT[i] == TOKENS[i]).mean())),
]
every_score = pytest.mark.parametrize(
    ("rows", "metric", "plain"), CASES, ids=[f"{name}-{place}" for place, (_, name, _) in enumerate(CASES)]
)


def read(folder: Path, rows: list[dict[str, Any]], **metrics: float) -> RunScores:
    write_json_lines(folder / "predictions.jsonl", rows)
    found = {name: Metric(value=value, n=len(rows)) for name, value in metrics.items()}
    return read_run_scores(folder, record(metrics=found))


@every_score
def test_a_score_is_the_tasks_own_and_the_mean_of_its_values(
    rows: list[dict[str, Any]], metric: str, plain: Callable[[Any], float], tmp_path: Path
) -> None:
    score = read(tmp_path, rows).scores[metric]
    assert score.value() == pytest.approx(plain(np.arange(N)), rel=1e-9)
    assert score.values().mean() == pytest.approx(score.value(), rel=1e-9)


@every_score
def test_an_examples_value_is_what_leaving_it_out_costs(
    rows: list[dict[str, Any]], metric: str, plain: Callable[[Any], float], tmp_path: Path
) -> None:
    values = read(tmp_path, rows).scores[metric].values()
    whole, everyone = plain(np.arange(N)), np.arange(N)
    left_out = np.array([(N - 1) * (whole - plain(np.delete(everyone, i))) for i in range(0, N, 8)])
    # both are the derivative by the example's weight, once at the whole and once a step of 1/n away from it
    scale = np.abs(values - whole).max()
    np.testing.assert_allclose((values - whole)[::8], left_out, atol=0.05 * scale)


@every_score
def test_its_interval_is_near_that_of_a_plain_bootstrap(
    rows: list[dict[str, Any]], metric: str, plain: Callable[[Any], float], tmp_path: Path
) -> None:
    runs = [read(tmp_path, rows)]
    drawn = resamples_over_runs(runs, metric)
    found = mean_over_seeds(values_over_runs(runs, [metric]), None if drawn is None else drawn[:, None])
    low_K, high_K = found.interval()
    score = runs[0].scores[metric]
    columns = score.columns_UF if score.places_N is None else score.columns_UF[score.places_N]
    assert float(score.finish(columns[:200].mean(axis=0))) == pytest.approx(plain(np.arange(200)))
    low, high = bootstrap_statistic(lambda i: float(score.finish(columns[i].mean(axis=0))), N, resamples=4000)
    # a quantile at 2.5 % of 4000 draws is known to sqrt(.025 x .975 / 4000) / .0584 = 0.042 sigma, 0.02 half-widths, on
    # both sides; four of their 0.03, and as much again for the curvature that the linear part leaves out
    assert (low_K[0], high_K[0]) == pytest.approx((low, high), abs=0.25 * (high - low) / 2)


def test_a_skewed_score_is_resampled_itself(tmp_path: Path) -> None:
    heavy = [{"row": i, "loss": 3.0 * (1 + 9 * (i == 0)), "tokens": 1 + 30 * (i == 0), "correct": 0} for i in range(60)]
    runs = [read(tmp_path, heavy)]
    drawn = resamples_over_runs(runs, "perplexity")
    assert drawn is not None
    # without the long example, about a third of all draws, perplexity is exp(3); the linear part never gets near
    assert drawn.max() == pytest.approx(np.exp(3.0), rel=1e-4)
    assert resamples_over_runs([read(tmp_path, LABEL_ROWS)], "macro_f1") is None


def test_guessing_and_the_most_common_label_are_scored(tmp_path: Path) -> None:
    rows = [{"row": i, "label": int(i >= 3), "prediction": 0, "scores": [0.5, 0.3, 0.2]} for i in range(10)]
    baselines = read(tmp_path, rows).baselines
    assert baselines["accuracy"].chance == pytest.approx(1 / 3)  # three labels by their scores, one never right
    assert baselines["accuracy"].majority == pytest.approx(0.7)
    # labels that neither occur nor are given do not count: F1 of 0 and of 2 x 7 / (10 + 7)
    assert baselines["macro_f1"].majority == pytest.approx((0 + 14 / 17) / 2)
    assert baselines["mcc"].chance == pytest.approx(0, abs=1e-12)
    assert read(tmp_path, TOKEN_ROWS).baselines == {}


def test_the_order_of_the_lines_and_their_probabilities_change_nothing(tmp_path: Path) -> None:
    first = read(tmp_path / "a", LABEL_ROWS)
    scored = [row | {"scores": [0.25] * 4, "loss": 1.5} for row in reversed(LABEL_ROWS)]
    second = read(tmp_path / "b", scored)
    assert second.test == first.test
    np.testing.assert_array_equal(second.scores["accuracy"].values(), first.scores["accuracy"].values())


def test_predictions_that_are_absent_broken_or_of_another_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no predictions\.jsonl: it was not scored"):
        read_run_scores(tmp_path, record())
    for text in ("", "{", '{"row": 0}\n', json.dumps({"row": 0, "label": [1], "prediction": 0}) + "\n"):
        (tmp_path / "predictions.jsonl").write_text(text)
        with pytest.raises(InputError, match="holds no predictions that can be compared"):
            read_run_scores(tmp_path, record())
    right = sum(row["label"] == row["prediction"] for row in LABEL_ROWS) / N
    assert read(tmp_path, LABEL_ROWS, accuracy=right)
    with pytest.raises(InputError, match="of different runs"):
        read(tmp_path, LABEL_ROWS, accuracy=right + 0.01)
