"""Intervals against closed forms and against simulations whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peftkit.errors import InputError
from peftkit.stats.bootstrap import (
    bootstrap_interval,
    bootstrap_scores,
    bootstrap_statistic,
    share_interval,
    t_interval,
)


def test_the_interval_of_a_mean_is_close_to_the_normal_one_for_many_examples() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 4000)
    half = 1.959964 * values.std() / math.sqrt(4000)
    low, high = bootstrap_interval(values, resamples=4000)
    # A quantile at 2.5 % of 4000 resamples has a standard error of sqrt(.025*.975/4000)/.0584 = 0.042 sigma; 4 of them.
    tolerance = 4 * 0.042 * values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, abs=tolerance)
    assert high == pytest.approx(values.mean() + half, abs=tolerance)


def test_a_wider_level_gives_a_wider_interval() -> None:
    values = [0.0, 1.0] * 100
    low, high = bootstrap_interval(values, level=0.95)
    wide_low, wide_high = bootstrap_interval(values, level=0.99)
    assert wide_low < low < 0.5 < high < wide_high


def test_equal_examples_leave_no_doubt() -> None:
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_blocks_do_not_change_how_many_resamples_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(10.0)
    seen: list[int] = []
    monkeypatch.setattr("peftkit.stats.bootstrap.DRAWS_AT_ONCE", 70)  # seven rows of ten a block, the last block short
    bootstrap_statistic(lambda rows: float(seen.append(len(rows)) or values[rows].mean()), 10, resamples=25)
    assert seen == [10] * 25
    whole = bootstrap_interval(values, resamples=25)
    monkeypatch.undo()
    assert whole == bootstrap_interval(values, resamples=25)


def test_a_statistic_that_is_a_mean_has_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(2).exponential(size=80)
    as_mean = bootstrap_interval(values, resamples=500, seed=5)
    as_statistic = bootstrap_statistic(lambda rows: float(values[rows].mean()), 80, resamples=500, seed=5)
    assert as_statistic == pytest.approx(as_mean, rel=1e-12)


def test_scores_together_have_the_intervals_they_have_alone() -> None:
    values = np.random.default_rng(3).normal(size=30)
    together = bootstrap_scores(
        lambda rows: {"mean": values[rows].mean(), "top": values[rows].max(), "none": math.nan}, 30
    )
    assert together == {
        "mean": bootstrap_statistic(lambda rows: float(values[rows].mean()), 30),
        "top": bootstrap_statistic(lambda rows: float(values[rows].max()), 30),
    }


def test_resamples_without_a_defined_statistic_are_left_out() -> None:
    values = np.array([1.0, 1.0, 1.0, 0.0])

    def ratio(rows: np.ndarray) -> float:
        ones = values[rows].sum()
        return float(4 / ones) if ones else math.nan

    low, high = bootstrap_statistic(ratio, 4)
    assert low == 1.0  # four ones in four draws: probability (3/4)^4 = 0.32, so far inside the lower tail
    assert math.isfinite(high)


def test_an_undefined_statistic_and_an_empty_split_are_refused() -> None:
    with pytest.raises(InputError, match="undefined on every resample"):
        bootstrap_statistic(lambda rows: math.nan, 3, resamples=10)
    with pytest.raises(InputError, match="no examples"):
        bootstrap_interval([])
    with pytest.raises(InputError, match="no examples"):
        bootstrap_statistic(lambda rows: 1.0, 0)


def test_the_t_interval_of_two_values_is_cauchys() -> None:
    # One degree of freedom is Cauchy: its 97.5 % quantile is tan(0.475 pi). s = sqrt(2)/2, so se = s/sqrt(2) = 1/2.
    low, high = t_interval([1.0, 2.0])
    assert low == pytest.approx(1.5 - math.tan(0.475 * math.pi) / 2)
    assert high == pytest.approx(1.5 + math.tan(0.475 * math.pi) / 2)


def test_the_t_interval_of_three_seeds_has_two_degrees_of_freedom() -> None:
    # t(2) has the closed quantile (2p-1) sqrt(2 / (4p(1-p))) at p = .975: 4.3027. s of 1, 2, 3 is 1, se = 1/sqrt(3).
    quantile = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - quantile / math.sqrt(3), 2 + quantile / math.sqrt(3)))


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(InputError, match="Add seeds"):
        t_interval([0.8])


@pytest.mark.slow
def test_intervals_cover_a_known_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    trials, n, truth = 2000, 400, 0.85
    hits = 0
    for trial in range(trials):
        low, high = bootstrap_interval(rng.random(n) < truth, resamples=1000, seed=trial)
        hits += low <= truth <= high
    # 2000 trials at 0.95 have a standard error of 0.0049; the percentile method itself is off by O(1/n) < 0.01.
    assert hits / trials == pytest.approx(0.95, abs=0.02)


def test_t_intervals_over_three_seeds_cover_a_known_truth_95_times_in_100() -> None:
    samples = np.random.default_rng(8).normal(0.87, 0.01, (4000, 3))
    hits = sum(low <= 0.87 <= high for low, high in map(t_interval, samples))
    assert hits / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_a_share_has_wilsons_interval_and_what_is_no_share_of_n_has_none() -> None:
    # all of n right: the lower end is 1 / (1 + z^2 / n)
    assert share_interval(1.0, 8) == (pytest.approx(1 / (1 + 1.959964**2 / 8), abs=1e-6), 1.0)
    assert share_interval(0.55, 10) is None
    assert share_interval(1.5, 10) is None
