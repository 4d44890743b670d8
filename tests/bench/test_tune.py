"""Tuning: the same number of trials for all, on validation data alone, none of them twice."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from peftkit.bench.executor import run_suite
from peftkit.bench.suite import Cell, Suite, build_suite
from peftkit.bench.tune import Tuned, tune_suite
from peftkit.errors import InputError, PeftkitError, RecipeError
from peftkit.recipe import Recipe
from peftkit.record import RunRecord, bare_record
from peftkit.report.rows import read_cells

RECIPE: dict[str, Any] = {
    "backbone": "minilm-l6",
    "task": "classify",
    "data": dict.fromkeys(("train", "validation", "test"), "builtin:movie-sentiment"),
    "training": {"budget": "640 examples"},
    "evaluation": {"every": 5},
}
RATE = "training.learning_rate"
WIDE = {"low": 1e-4, "high": 1e-2, "log": True}


def suite(tune: dict[str, Any] | None = None, **content: Any) -> Suite:
    variants = {"ask": {"method": "zero-shot"}, "full": {"method": "full"}, "lora": {"method": "lora"}}
    tuned = {"trials": 4, "space": {RATE: WIDE}} | (tune or {})
    return build_suite({"name": "s", "recipe": RECIPE, "variants": variants, "tune": tuned, **content})


@dataclass
class End:
    record: RunRecord


Score = Callable[[Recipe], float]


def near(best: float) -> Score:
    """An accuracy that falls off with the distance of the rate from the best one, in orders of magnitude."""
    return lambda recipe: 1 - abs(math.log10(recipe.training.learning_rate / best)) / 10


class Runner:
    """Runs cells without training anything: half of the score at step 5, all at step 10. Finished ones are kept."""

    def __init__(self, score: Score, *, metric: str = "accuracy", stop_after: int | None = None) -> None:
        self.score, self.metric, self.stop_after = score, metric, stop_after
        self.ran: list[Cell] = []
        self.done: dict[str, RunRecord] = {}

    def __call__(self, cells: Sequence[Cell], folder: Path) -> list[End]:
        return [End(self.done.get(cell.name) or self.run(cell, folder)) for cell in cells]

    def run(self, cell: Cell, folder: Path) -> RunRecord:
        if len(self.ran) == self.stop_after:
            raise KeyboardInterrupt
        self.ran.append(cell)
        self.done[cell.name] = record = self.record(cell.recipe)
        record.write(folder / cell.name)
        return record

    def record(self, recipe: Recipe) -> RunRecord:
        score = self.score(recipe)
        if math.isnan(score):
            return bare_record(recipe, "diverged", "the loss is nan", environment={})
        missed = score / 2 < recipe.evaluation.hurdles.get(5, -1.0)
        history = [{"step": 5, self.metric: score / 2}, {"step": 10, self.metric: score}][: 1 if missed else 2]
        best = min(history, key=lambda row: row[self.metric] * (1 if self.metric == "loss" else -1))["step"]
        guards = {"best_step": best, "metric": self.metric} | ({"missed_hurdle": 5} if missed else {})
        found = bare_record(recipe, "failed", "", environment={})
        return found.model_copy(update={"status": "ok", "error": None, "history": history, "guards": guards})


def tuned(found: Suite, out: Path, runner: Runner) -> dict[str, Tuned]:
    return tune_suite(found, out, run=runner, say=lambda text: None)


def test_every_variant_that_trains_gets_the_same_number_of_trials_and_the_best_one_is_chosen(tmp_path: Path) -> None:
    runner = Runner(near(1e-3))
    found = tuned(suite(), tmp_path, runner)
    assert list(found) == ["full", "lora"]
    by_variant = {name: [c for c in runner.ran if c.name.startswith(f"{name}/")] for name in found}
    assert {name: len(cells) for name, cells in by_variant.items()} == {"full": 4, "lora": 4}
    for name, cells in by_variant.items():
        rates = [cell.recipe.training.learning_rate for cell in cells]
        nearest = min(rates, key=lambda rate: abs(math.log10(rate / 1e-3)))
        assert found[name].chosen == {RATE: nearest}
        assert rates[0] == pytest.approx(1e-3)  # the middle of the space comes first
        assert len({math.floor(2 * math.log10(rate / 1e-4) / 2) for rate in rates}) == 2  # both halves are tried
        assert (found[name].trials, found[name].metric, found[name].seed) == (4, "accuracy", 1000)


def test_a_trial_never_sees_test_data_and_has_the_tuning_seed(tmp_path: Path) -> None:
    runner = Runner(near(1e-3))
    tuned(suite({"trial": {"training.budget": "320 examples"}}), tmp_path, runner)
    assert {cell.recipe.data.test for cell in runner.ran} == {None}
    assert {cell.recipe.seed for cell in runner.ran} == {1000}
    assert {cell.recipe.training.budget for cell in runner.ran} == {"320 examples"}


def test_the_chosen_point_runs_with_the_suites_own_seeds_budget_and_test_data(tmp_path: Path) -> None:
    own = suite({"trial": {"training.budget": "320 examples"}}, seeds=[0, 1])
    found = tuned(own, tmp_path, Runner(near(1e-4)))
    cells = own.cells({name: each.chosen for name, each in found.items()})
    assert [(cell.variant, cell.recipe.seed) for cell in cells[2:]] == [
        *(("full", 0), ("full", 1), ("lora", 0), ("lora", 1))
    ]
    for cell in cells[2:]:
        assert cell.recipe.training.learning_rate == found[cell.variant].chosen[RATE]
        assert (cell.recipe.training.budget, cell.recipe.data.test) == ("640 examples", "builtin:movie-sentiment")
        assert cell.recipe.evaluation.hurdles == {}


def test_a_hurdle_is_the_median_of_the_complete_trials_before_it_and_who_misses_it_is_not_chosen(
    tmp_path: Path,
) -> None:
    scores = iter([0.6, 0.8, 0.4, 0.9])
    runner = Runner(lambda recipe: next(scores))
    own = suite(variants={"lora": {"method": "lora"}})
    found = tuned(own, tmp_path, runner)
    hurdles = [cell.recipe.evaluation.hurdles for cell in runner.ran]
    # the third reached 0.2 at step 5, below the median of 0.3 and 0.4: it was stopped, and counts for no median
    assert hurdles == [{}, {}, {5: median([0.3, 0.4])}, {5: median([0.3, 0.4])}]
    study = json.loads((tmp_path / "tuning" / "lora" / "study.json").read_text())
    assert [trial["state"] for trial in study["tried"]] == ["complete", "complete", "pruned", "complete"]
    assert found["lora"].value == 0.9
    assert study["best"] == {"values": found["lora"].chosen, "accuracy": 0.9}


def test_pruning_can_be_left_out(tmp_path: Path) -> None:
    runner = Runner(near(1e-3))
    tuned(suite({"prune_after": None}), tmp_path, runner)
    assert [cell.recipe.evaluation.hurdles for cell in runner.ran] == [{}] * 8


def test_the_lowest_loss_is_the_best(tmp_path: Path) -> None:
    runner = Runner(lambda recipe: recipe.training.learning_rate, metric="loss")
    found = tuned(suite({"metric": "loss", "prune_after": None}), tmp_path, runner)
    rates = [cell.recipe.training.learning_rate for cell in runner.ran if cell.name.startswith("lora/")]
    assert found["lora"].chosen == {RATE: min(rates)}
    assert {cell.recipe.evaluation.metric for cell in runner.ran} == {"loss"}


@pytest.mark.parametrize("trials", [4, 12])  # quasi-random points, and TPE
def test_a_killed_search_goes_on_with_the_same_points_and_runs_none_twice(trials: int, tmp_path: Path) -> None:
    own = suite({"trials": trials})
    straight = Runner(near(2e-3))
    found = tuned(own, tmp_path / "straight", straight)
    broken = Runner(near(2e-3), stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        tuned(own, tmp_path / "broken", broken)
    broken.stop_after = None
    assert tuned(own, tmp_path / "broken", broken) == found
    assert [cell.name for cell in broken.ran] == [cell.name for cell in straight.ran]


def test_what_diverged_counts_as_a_trial_and_is_not_tried_again(tmp_path: Path) -> None:
    runner = Runner(lambda recipe: math.nan if recipe.training.learning_rate > 9e-4 else 0.5)
    found = tuned(suite(), tmp_path, runner)
    assert found["lora"].value == 0.5
    runner.done.clear()  # only the records on the disk are left
    runner.ran.clear()
    assert tuned(suite(), tmp_path, runner) == found
    assert all(cell.recipe.training.learning_rate <= 9e-4 for cell in runner.ran)


def test_a_variant_without_a_good_trial_is_named_with_its_reason_and_left_untuned(tmp_path: Path) -> None:
    runner, said = Runner(lambda recipe: math.nan if recipe.method.kind == "full" else 0.5), list[str]()
    assert list(tune_suite(suite(), tmp_path, run=runner, say=said.append)) == ["lora"]
    assert "full: no trial ended well, the last: diverged, the loss is nan. It runs untuned." in said


def test_nothing_that_could_be_tuned_ends_the_suite(tmp_path: Path) -> None:
    with pytest.raises(PeftkitError, match="full: no trial ended well, the last: diverged, the loss is nan"):
        tuned(suite(), tmp_path, Runner(lambda recipe: math.nan))


def test_lists_are_drawn_from_their_grid_each_point_once(tmp_path: Path) -> None:
    targets = [["query"], ["query", "value"]]
    space = {RATE: [1e-3, 1e-2], "method.targets": targets}
    runner = Runner(near(1e-3))
    tuned(suite({"space": space}, variants={"lora": {"method": "lora"}}), tmp_path, runner)
    tried = [(c.recipe.training.learning_rate, c.recipe.method.model_dump()["targets"]) for c in runner.ran]
    assert sorted(tried) == [(rate, names) for rate in (1e-3, 1e-2) for names in targets]


def test_a_variant_has_its_own_space_above_the_shared_one(tmp_path: Path) -> None:
    runner = Runner(near(1e-3))
    ranks = {"method.rank": {"low": 4, "high": 64, "log": True}, RATE: None}
    tuned(suite({"spaces": {"lora": ranks}}), tmp_path, runner)
    lora = [cell.recipe for cell in runner.ran if cell.name.startswith("lora/")]
    assert {recipe.training.learning_rate for recipe in lora} == {2e-4}  # the recipe's own
    assert all(4 <= recipe.method.model_dump()["rank"] <= 64 for recipe in lora)
    assert lora[0].method.model_dump()["rank"] == 16


@pytest.mark.parametrize(
    ("tune", "content", "told"),
    [
        ({"space": {}}, {}, "has nothing to search"),
        ({"space": {RATE: [1e-3]}}, {}, "its space has 1 points for 4 trials"),
        ({"seed": 1}, {"seeds": [0, 1]}, "tune.seed 1 is one of the suite's seeds"),
        ({"spaces": {"lroa": {}}}, {}, "no variant 'lroa'; did you mean 'lora'?"),
        ({}, {"always": {RATE: 1e-3}}, f"{RATE} is searched, and an override sets it"),
        ({}, {"grid": {RATE: [1e-3, 1e-2]}}, f"{RATE} is searched, and the variant or the grid sets it"),
        ({}, {"always": {"data.validation": None}}, "needs data.validation to score trials on"),
        ({"trial": {"evaluation.every": "never"}}, {}, "evaluation.every is never"),
        ({"space": {RATE: {"low": -1.0, "high": 1.0}}}, {}, "training.learning_rate: input should be greater than 0"),
        ({"space": {RATE: {"low": 1.0, "high": 0.1}}}, {}, "low must be below high"),
        ({"space": {"training.learning_rat": WIDE}}, {}, "unknown key; did you mean 'learning_rate'?"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_anything_runs(
    tune: dict[str, Any], content: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        suite(tune, **content).cells()
    assert told in str(caught.value)


def test_a_missing_optuna_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 'peftkit\[search\]'"):
        run_suite(suite(), tmp_path / "out", report_progress=lambda text: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tuned_suite_runs_in_processes_and_its_rows_say_so(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    source = str(reviews_file)
    recipe = {
        "backbone": {"name": str(tiny_bert), "dtype": "float32"},
        "method": "lora",
        "task": "classify",
        "data": {"train": source, "validation": source, "test": source},
        "training": {"budget": "16 examples"},
    }
    own = build_suite({"name": "s", "recipe": recipe, "tune": {"trials": 2, "space": {RATE: WIDE}}})
    (result,) = run_suite(own, tmp_path, report_progress=lambda text: None)
    assert result.status == "ok", result.record.error
    study = json.loads((tmp_path / "tuning" / "lora" / "study.json").read_text())
    assert [trial["state"] for trial in study["tried"]] == ["complete", "complete"]
    (row,) = read_cells([tmp_path])
    assert row.tuned is not None
    assert row.tuned["chosen"] == study["best"]["values"]
    assert result.cell.recipe.training.learning_rate == row.tuned["chosen"][RATE]
    assert "Tuned (*): the best of 2 trials by validation accuracy" in (tmp_path / "report.md").read_text()
    for record in (tmp_path / "tuning").rglob("record.json"):
        assert "metrics" not in json.loads(record.read_text()) or not json.loads(record.read_text())["metrics"]
