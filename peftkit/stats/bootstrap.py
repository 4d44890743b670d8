"""Intervals by bootstrap over examples alone, and by Student's t over seeds alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from peftkit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DRAWS_AT_ONCE = 2**21
"""Resampled examples held in memory at a time; 16 MiB of indices."""


def bootstrap_interval(
    per_example: Sequence[float] | npt.NDArray[np.floating],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over examples (Efron & Tibshirani 1993, chapter 13).

    Args:
        per_example: [n] one score an example.

    Raises:
        InputError: no examples.
    """
    import numpy as np

    values = np.asarray(per_example, dtype=np.float64)
    _require_some(len(values))
    rng = np.random.default_rng(seed)
    means = [values[rows].mean(axis=1) for rows in index_blocks(rng, len(values), resamples)]
    return _percentiles(np.concatenate(means), level)


def bootstrap_statistic(
    statistic: Callable[[npt.NDArray[np.intp]], float],
    n: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of any statistic of n examples: F1, correlation, perplexity.

    Args:
        statistic: takes [n] indices of examples, drawn with replacement; returns the statistic of those examples.
            Resamples on which it is undefined (not finite) are left out.

    Raises:
        InputError: no examples, or the statistic is undefined on every resample.
    """
    scores = bootstrap_scores(lambda rows: {"": statistic(rows)}, n, resamples=resamples, seed=seed, level=level)
    if not scores:
        raise InputError(f"the statistic is undefined on every resample of {n} examples. Score more examples.")
    return scores[""]


def bootstrap_scores(
    statistics: Callable[[npt.NDArray[np.intp]], Mapping[str, float]],
    n: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of several statistics of n examples, all from the same resamples.

    Args:
        statistics: takes [n] indices of examples, drawn with replacement; returns named statistics of those examples.
            Those undefined (not finite) on every resample have no interval.

    Raises:
        InputError: no examples.
    """
    import numpy as np

    _require_some(n)
    drawn: dict[str, list[float]] = {}
    for rows in index_blocks(np.random.default_rng(seed), n, resamples):
        for row in rows:
            for name, value in statistics(row).items():
                if np.isfinite(value):
                    drawn.setdefault(name, []).append(float(value))
    return {name: _percentiles(np.asarray(values), level) for name, values in drawn.items()}


def bootstrap_counts(
    scores: Callable[[npt.NDArray[np.int64]], Mapping[str, npt.NDArray[np.float64]]],
    counts: npt.NDArray[np.int64],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of scores that depend on counts alone, such as a confusion matrix.

    Drawing examples with replacement draws their cells from a multinomial, so no example is touched.

    Args:
        scores: takes [resamples, *counts.shape]; returns [resamples] a score.

    Raises:
        InputError: no examples.
    """
    import numpy as np

    total = int(counts.sum())
    _require_some(total)
    drawn = np.random.default_rng(seed).multinomial(total, counts.ravel() / total, size=resamples)
    found = scores(drawn.reshape(resamples, *counts.shape))
    return {name: _percentiles(values, level) for name, values in found.items()}


def share_interval(value: float, n: int, *, level: float = 0.95) -> tuple[float, float] | None:
    """Wilson's interval (1927) of a share of n examples that are right or wrong; None where it is not such a share."""
    right = round(value * n)
    if not 0 <= right <= n or abs(right - value * n) > 1e-3:
        return None
    from scipy.stats import binomtest

    found = binomtest(right, n).proportion_ci(confidence_level=level, method="wilson")
    return float(found.low), float(found.high)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent values, for example one score a seed.

    Raises:
        InputError: fewer than two values.
    """
    import numpy as np
    from scipy.special import stdtrit

    if len(values) < 2:
        raise InputError(f"an interval over seeds needs two values or more, and there is {len(values)}. Add seeds.")
    array = np.asarray(values, dtype=np.float64)
    half = float(stdtrit(len(array) - 1, 0.5 + level / 2)) * float(array.std(ddof=1)) / float(np.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half


def index_blocks(rng: np.random.Generator, n: int, resamples: int) -> Iterator[npt.NDArray[np.intp]]:
    """Blocks of [some, n] indices drawn with replacement, `resamples` rows in all."""
    import numpy as np

    block = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, block):
        yield rng.integers(0, n, size=(min(block, resamples - start), n), dtype=np.intp)


def _percentiles(drawn: npt.NDArray[np.float64], level: float) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _require_some(n: int) -> None:
    if n < 1:
        raise InputError("there are no examples to score: an interval needs at least one. Check the test split.")
