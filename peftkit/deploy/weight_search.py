"""Weights for a combination, found on validation data (Optuna's TPE: Bergstra et al. 2011)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.deploy.exams import Exam, ScoreRow, Seated, TaskScore, best_of, cost, seat
from peftkit.deploy.mixing import Mix
from peftkit.errors import InputError
from peftkit.extras import load_optuna
from peftkit.record import Part

if TYPE_CHECKING:
    from torch import Tensor

    from peftkit.data.features import Features

LARGEST_WEIGHT = 1.5
"""Weights are sought from 0 to this: a sum of deltas rarely gains from one beyond its own size."""

Tensors = dict[str, "Tensor"]
Build = Callable[[Sequence[float]], Tensors]
"""The adapter's tensors for some weights, by the names in the file, always of the same shapes."""


class Trial(Part):
    """One set of weights and its cost."""

    weights: tuple[float, ...]
    cost: float


class Search(Part):
    """What was tried, in order. The cost is the mean over tasks of what is lost against the best part alone, as a
    share of that part's score; below zero the combination is better than any part on average."""

    seed: int
    trials: tuple[Trial, ...]
    best: Trial
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The mix with the weights that did best, and the search itself."""

    mix: Mix
    search: Search


def search_weights(
    how: Mix,
    rows: Sequence[ScoreRow],
    exams: Sequence[Exam],
    *,
    build: Build,
    write: Callable[[Path, Tensors], None],
    trials: int,
    base: str | None,
    say: Callable[[str], None],
) -> Found:
    """Try weights and keep the best; the parts alone and their mean are among the tries.

    Args:
        rows: what each part scores alone, in the order of the weights.
        build: makes a combination; it is put into a model that is loaded once.
        write: makes an adapter's folder of one, to load that model with.

    Raises:
        InputError: no optuna, no trials, or no task that the combination can answer.
    """
    optuna = load_optuna("--search")
    starts = _starts(len(rows), how)
    if trials < len(starts):
        raise InputError(f"--trials {trials} is too few: {len(starts)} are the parts alone and their mean.")
    with tempfile.TemporaryDirectory(prefix="peftkit-search-") as folder:
        write(Path(folder), build(starts[0]))
        seated = seat(Path(folder), base)
        asked = [(exam, exam.encode(seated.backbone, "validation")) for exam in exams if exam.head == seated.head]
        if not asked:
            raise InputError(
                "--search has no task to search on: the combination's head fits none. See --head and --on."
            )
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=how.seed), direction="minimize")
        for start in starts:
            study.enqueue_trial({str(index): weight for index, weight in enumerate(start)})
        done: list[Trial] = []

        def attempt(trial: Any) -> float:
            weights = tuple(trial.suggest_float(str(index), 0.0, LARGEST_WEIGHT) for index in range(len(rows)))
            if not any(weights):
                raise optuna.TrialPruned
            price = _price(_score(seated, build(weights), asked), rows)
            if not done or price < min(each.cost for each in done):
                say(f"trial {len(done) + 1} of {trials}: {_told(weights)} costs {price:+.4f}")
            done.append(Trial(weights=weights, cost=price))
            return price

        study.optimize(attempt, n_trials=trials)
    best = min(done, key=lambda each: each.cost)
    labels = tuple(exam.label for exam, _ in asked)
    search = Search(seed=how.seed or 0, trials=tuple(done), best=best, tasks=labels)
    return Found(replace(how, weights=best.weights), search)


def _starts(count: int, how: Mix) -> list[tuple[float, ...]]:
    """The default weights, then each part alone."""
    alone = [tuple(float(one == other) for other in range(count)) for one in range(count)]
    return list(dict.fromkeys([tuple(how.weights or ()), *alone]))


def _score(seated: Seated, tensors: Tensors, asked: Sequence[tuple[Exam, Sequence[Features]]]) -> dict[str, TaskScore]:
    """The scores of a combination, put in place of the one that the model holds."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(seated.adapted.model, tensors)
    return {
        exam.label: exam.score(seated.adapted, seated.backbone, features, intervals=False) for exam, features in asked
    }


def _price(scores: dict[str, TaskScore], rows: Sequence[ScoreRow]) -> float:
    """The mean over tasks of the cost against the best part, as a share of that part's score."""
    shares = []
    for label, score in scores.items():
        best = best_of(rows, label)
        assert best is not None, "a part gave the combination its head, so it has a score here"
        shares.append(cost(score, best[1]) / (abs(best[1].value) or 1.0))
    return sum(shares) / len(shares)


def _told(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3g}" for weight in weights)
