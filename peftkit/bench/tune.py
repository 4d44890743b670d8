"""Fair tuning: rounds of trials, one of every variant a round, each a cell in a process of its own.

    OUT/tuning/VARIANT/trial-N-DIGEST/{recipe.yaml, record.json, ...}   study.json

Optuna draws the points. A point depends on the seed and on the trials before it alone, so a call that was killed draws
the same ones again and finds their records: no trial runs twice. A trial's recipe has no test data. From the third
trial on it also names the values that it must reach (`evaluation.hurdles`): the medians of the trials before it.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from peftkit.bench.cell import current_record
from peftkit.bench.suite import Cell, Point, Suite, slug_of
from peftkit.bench.tuning import Range, Settings, Space, Tune, middle_place
from peftkit.errors import PeftkitError
from peftkit.extras import load_optuna
from peftkit.files import write_json
from peftkit.record import RunRecord
from peftkit.report.rows import LOWER_IS_BETTER

TUNING_FOLDER = "tuning"
STUDY_NAME = "study.json"
FEW_TRIALS = 10
"""Up to so many, points are spread evenly: TPE draws its first ten at random."""
Say = Callable[[str], None]


class Ended(Protocol):
    """How a cell ended."""

    @property
    def record(self) -> RunRecord: ...


RunCells = Callable[[Sequence[Cell], Path], Sequence[Ended]]
"""Runs the missing ones of some cells in a folder; their ends, in order."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning chose for one variant.

    Attributes:
        trials: how many it got, pruned and failed ones included.
        metric: of the validation split, by which the value was chosen.
        chosen: dotted recipe keys.
    """

    trials: int
    metric: str
    seed: int
    chosen: Settings
    value: float

    def document(self) -> dict[str, Any]:
        """As `cells.json` has it."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of a space and what became of it.

    Attributes:
        state: `complete`, `pruned`, or how the run failed.
        scores: step -> the metric on validation data.
        value: of the weights that the run kept; None unless it was complete.
    """

    values: Settings
    folder: str
    state: str
    reason: str | None
    metric: str | None
    value: float | None
    scores: dict[int, float]
    hurdles: dict[int, float]


@dataclass(slots=True)
class Study:
    """The trials of one variant."""

    point: Point
    tune: Tune
    space: Space
    optuna: Any
    trials: list[Trial] = field(default_factory=list)
    asked: Any = None

    @property
    def name(self) -> str:
        """The variant's, for people; a suite may have but one, without a name."""
        return self.point.variant or str(self.point.content["method"])

    @property
    def values(self) -> Settings:
        """The point that was asked for, as dotted recipe keys."""
        asked = self.asked.params
        return {k: asked[k] if isinstance(v, Range) else v[asked[k]] for k, v in self.space.items()}

    @classmethod
    def open(cls, point: Point, tune: Tune, optuna: Any) -> Study:
        """A study that has not asked for anything yet."""
        space = tune.space_of(point.name)
        return cls(point, tune, space, _create(optuna, space, tune))

    def ask(self, suite: Suite) -> Cell:
        """The next trial as a cell."""
        self.asked = self.optuna.ask(_distributions(self.space))
        recipe = suite.trial(self.point, self.values, self.hurdles())
        number = len(self.trials) + 1
        folder = f"{slug_of(self.name)}/trial-{number}-{recipe.digest[:8]}"
        return Cell(folder, f"tuning {self.name}, trial {number} of {self.tune.trials},", recipe)

    def hurdles(self) -> dict[int, float]:
        """Step -> median of the complete trials, where there are enough of them."""
        found: dict[int, list[float]] = {}
        for trial in self.trials:
            if trial.state == "complete":
                for step in sorted(trial.scores)[:-1]:
                    found.setdefault(step, []).append(trial.scores[step])
        enough = self.tune.prune_after
        return {} if enough is None else {s: median(v) for s, v in sorted(found.items()) if len(v) >= enough}

    def tell(self, cell: Cell, record: RunRecord) -> None:
        """Take the end of the trial that was asked for."""
        from optuna.trial import TrialState

        trial = read_trial(cell, record, self.values)
        self.trials.append(trial)
        sign = 1.0 if trial.metric in LOWER_IS_BETTER else -1.0
        for step, score in trial.scores.items():
            self.asked.report(sign * score, step)
        if trial.value is not None:
            self.optuna.tell(self.asked, sign * trial.value)
        else:
            self.optuna.tell(self.asked, state=TrialState.PRUNED if trial.state == "pruned" else TrialState.FAIL)

    def best(self) -> Trial | None:
        """The best complete trial, the earliest of equals; None when there is none."""
        complete = [trial for trial in self.trials if trial.value is not None]
        sign = 1.0 if complete and complete[0].metric in LOWER_IS_BETTER else -1.0
        return min(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def document(self) -> dict[str, Any]:
        """Everything that is known, for `study.json`."""
        space = {key: v.model_dump() if isinstance(v, Range) else v for key, v in self.space.items()}
        trials = [{name: getattr(trial, name) for name in trial.__slots__} for trial in self.trials]
        best = self.best()
        settings = {"trials": self.tune.trials, "seed": self.tune.seed, "sampler": type(self.optuna.sampler).__name__}
        found = {} if best is None else {"best": {"values": best.values, best.metric: best.value}}
        return {"variant": self.name, **settings, "space": space, **found, "tried": trials}


def tune_suite(suite: Suite, out: Path, *, run: RunCells, say: Say) -> dict[str, Tuned]:
    """What is best for every variant that trains, by its name; nothing for a suite that does not tune.

    A variant none of whose trials ended well is left out, and so runs as the suite has it: its rows then say what is
    wrong with it, and reports that it was not tuned.

    Args:
        run: runs the trials of a round, of which no two depend on each other.

    Raises:
        InputError: optuna is missing; nothing was run.
        PeftkitError: no trial of any variant ended well.
    """
    if suite.tune is None:
        return {}
    optuna = load_optuna("tune")
    studies = [Study.open(point, suite.tune, optuna) for point in suite.tuned_points()]
    folder = out / TUNING_FOLDER
    for number in range(1, suite.tune.trials + 1 if studies else 1):
        say(f"tuning, round {number} of {suite.tune.trials}: {len(studies)} trials")
        cells = [study.ask(suite) for study in studies]
        records = _records(cells, folder, run)
        for study, cell in zip(studies, cells, strict=True):
            study.tell(cell, records[cell.name])
            write_json((folder / cell.name).parent / STUDY_NAME, study.document())
    return {study.point.variant: _outcome(study, say) for study in _successful(studies, folder, say)}


def _records(cells: Sequence[Cell], folder: Path, run: RunCells) -> dict[str, RunRecord]:
    """The record of each cell. What diverged would do so again, and is not tried twice."""
    records: dict[str, RunRecord] = {}
    for cell in cells:
        known = current_record(folder / cell.name, cell.recipe.digest)
        if known is not None and known.status == "diverged":
            records[cell.name] = known
    left = [cell for cell in cells if cell.name not in records]
    ends = run(left, folder) if left else []
    return records | {cell.name: end.record for cell, end in zip(left, ends, strict=True)}


def _successful(studies: Sequence[Study], folder: Path, say: Say) -> Sequence[Study]:
    """The studies that have a best trial; the others are told, each with the reason of its last trial.

    Raises:
        PeftkitError: there are others only.
    """
    lost = [study for study in studies if study.best() is None]
    told = [f"{s.name}: no trial ended well, the last: {s.trials[-1].state}, {s.trials[-1].reason}" for s in lost]
    if lost and len(lost) == len(studies):
        raise PeftkitError("\n  - ".join([f"nothing could be tuned, see {folder}:", *told]))
    for line in told:
        say(f"{line}. It runs untuned.")
    return [study for study in studies if study not in lost]


def _outcome(study: Study, say: Say) -> Tuned:
    best = study.best()
    assert best is not None
    assert best.metric is not None
    assert best.value is not None
    told = ", ".join(f"{key.rsplit('.', 1)[-1]} {_short(value)}" for key, value in best.values.items())
    say(f"{study.name}: {told} of {len(study.trials)} trials, validation {best.metric} {best.value:.4g}")
    return Tuned(len(study.trials), best.metric, study.tune.seed, best.values, best.value)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def read_trial(cell: Cell, record: RunRecord, values: Settings) -> Trial:
    """A trial from its record. Its value is the score of the weights that the run kept, which it took itself."""
    metric = record.guards.get("metric")
    scores = {int(row["step"]): float(row[metric]) for row in record.history if metric in row}
    kept = record.guards.get("best_step") if cell.recipe.evaluation.keep == "best" else max(scores, default=None)
    pruned = "missed_hurdle" in record.guards
    value = None if record.status != "ok" or pruned or kept is None else scores[kept]
    state = "pruned" if pruned else "complete" if value is not None else record.status
    hurdles = dict(cell.recipe.evaluation.hurdles)
    return Trial(values, cell.name, state, record.error, metric, value, scores, hurdles)


def _create(optuna: Any, space: Space, tune: Tune) -> Any:
    """A study whose points are spread over the space, the first in its middle; of lists alone, from their grid."""
    samplers = optuna.samplers
    if tune.trials <= FEW_TRIALS:
        with warnings.catch_warnings():  # optuna calls it experimental, for years now
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = samplers.QMCSampler(scramble=True, seed=tune.seed, warn_independent_sampling=False)
    else:
        sampler = samplers.TPESampler(seed=tune.seed)
    study = optuna.create_study(sampler=sampler)
    first = {key: middle_place(values) for key, values in space.items()}
    for point in _grid(space, tune) or [first]:
        study.enqueue_trial(point)
    return study


def _grid(space: Space, tune: Tune) -> list[dict[str, int | float]]:
    """Of lists alone, as many of their combinations as there are trials, in an order that the seed decides."""
    places = [range(len(values)) for values in space.values() if not isinstance(values, Range)]
    if len(places) < len(space):
        return []
    points: list[dict[str, int | float]]
    points = [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*places)]
    return random.Random(tune.seed).sample(points, tune.trials)


def _distributions(space: Space) -> Mapping[str, Any]:
    """What is asked for each key; of a list, the place in it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    return {
        key: CategoricalDistribution(range(len(values)))
        if not isinstance(values, Range)
        else (IntDistribution if values.whole else FloatDistribution)(values.low, values.high, log=values.log)
        for key, values in space.items()
    }
