"""Variants compared in pairs: who with whom, what comes out, and in which words."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from made_up import record, row
from rich.cells import cell_len

from peftkit.errors import InputError
from peftkit.files import write_json_lines
from peftkit.record import Metric
from peftkit.report.comparison import compare_folders, compare_rows, compare_variants, write_differences
from peftkit.report.document import write_report
from peftkit.report.rows import CellRow, summarise
from peftkit.report.tables import difference_lines, render_markdown

N = 1000
RNG = np.random.default_rng(0)
TRUTH = RNG.integers(0, 2, N)
HARD = RNG.normal(size=N)
Right = npt.NDArray[np.bool_]


def right(level: float, seed: int = 0) -> Right:
    """Which examples a run of this level gets right; hard ones are hard for all."""
    found: Right = HARD + 0.3 * np.random.default_rng([seed, 7]).normal(size=N) < level
    return found


def cell(folder: Path, variant: str, found: Right, seed: int = 0, *, truth: Any = TRUTH, labels: int = 2) -> CellRow:
    """A classification run that gets some examples right."""
    path = folder / f"{variant}-seed{seed}"
    given = np.where(found, truth[: len(found)], (truth[: len(found)] + 1) % labels)
    write_json_lines(
        path / "predictions.jsonl",
        [
            {"row": i, "label": int(truth[i]), "prediction": int(p), "scores": [0.5] * labels}
            for i, p in enumerate(given)
        ],
    )
    value = float((given == truth[: len(found)]).mean())
    document = record(
        seed, metrics={"accuracy": Metric(value=value, low=value - 0.02, high=value + 0.02, n=len(given))}
    )
    document.write(path)
    return CellRow(variant, seed, path, document)


def language_cell(folder: Path, variant: str, loss: Sequence[float]) -> CellRow:
    path = folder / variant
    write_json_lines(
        path / "predictions.jsonl", [{"row": i, "loss": x, "tokens": 10, "correct": 5} for i, x in enumerate(loss)]
    )
    value = float(np.exp(np.mean(loss) / 10))
    document = record(metrics={"perplexity": Metric(value=value, n=len(loss))})
    document.write(path)
    return CellRow(variant, 0, path, document)


def lines_of(rows: Sequence[CellRow]) -> list[str]:
    return difference_lines(compare_rows(rows), summarise(rows))


def test_a_difference_is_that_of_the_same_examples(tmp_path: Path) -> None:
    one, other = right(0.9), right(1.0, 1)
    (found,) = compare_variants([cell(tmp_path, "full", other), cell(tmp_path, "lora", one)])
    assert (found.variant, found.reference, found.metric) == ("full", "lora", "accuracy")
    assert found.value == pytest.approx(other.mean() - one.mean())
    # the paired standard error: of the example-wise differences
    error = (other.astype(float) - one).std() / np.sqrt(N)
    assert (found.low, found.high) == pytest.approx(
        (found.value - 1.96 * error, found.value + 1.96 * error), abs=0.2 * error
    )
    assert found.detectable == pytest.approx((1.96 + 0.84) * error, rel=0.1)
    assert (found.num_examples, found.num_seeds, found.basis) == (N, 1, "examples")


def test_the_reference_is_lora_or_the_best_or_the_one_that_is_named(tmp_path: Path) -> None:
    rows = [cell(tmp_path, name, right(level)) for name, level in (("head", 0.2), ("lora", 0.7), ("full", 0.9))]
    assert {found.reference for found in compare_variants(rows)} == {"lora"}
    assert [found.variant for found in compare_variants(rows)] == ["full", "head"]  # by their scores
    assert {found.reference for found in compare_variants([rows[0], rows[2]])} == {"full"}
    assert {found.reference for found in compare_variants(rows, "head")} == {"head"}
    with pytest.raises(InputError, match="no variant 'lorra' among full, lora, head; did you mean 'lora'"):
        compare_variants(rows, "lorra")


def test_a_reference_at_several_places_of_a_grid_is_taken_at_each_ones_own(tmp_path: Path) -> None:
    levels = {"full, film": 0.9, "lora, film": 0.7, "lora, press": 0.6, "head, press": 0.2, "head, law": 0.1}
    press = 1 - TRUTH  # another test
    rows = [
        cell(tmp_path, name, right(level), truth=TRUTH if "film" in name else press) for name, level in levels.items()
    ]
    comparison = compare_rows(rows, "lora")
    assert {found.variant: found.reference for found in comparison.differences} == {
        "full, film": "lora, film",
        "head, press": "lora, press",
    }
    assert comparison.left_out == {"head, law": "in lora, law, no finished run (not there)."}
    (heading, *_) = difference_lines(comparison, summarise(rows))
    assert heading == "points of accuracy against lora, film and lora, press, 1,000 examples and 1 seed in pairs:"
    with pytest.raises(InputError, match="did you mean"):
        compare_rows(rows, "lorra, film")


def test_equal_seeds_are_paired_and_unequal_ones_are_not(tmp_path: Path) -> None:
    lora = [cell(tmp_path, "lora", right(0.8, seed), seed) for seed in range(3)]
    full = [cell(tmp_path, "full", right(0.9, seed), seed) for seed in range(3)]
    (paired,) = compare_variants([*lora, *full])
    assert (paired.paired_seeds, paired.num_seeds, paired.basis) == (True, 3, "seeds and examples")
    (unpaired,) = compare_variants([*lora, full[0]])
    assert (unpaired.paired_seeds, unpaired.num_seeds, unpaired.reference_seeds) == (False, 1, 3)
    assert unpaired.value == pytest.approx(
        right(0.9, 0).mean() - np.mean([right(0.8, seed).mean() for seed in range(3)])
    )


def test_verdicts_say_better_worse_undecided_and_the_same(tmp_path: Path) -> None:
    one = right(0.8)
    slightly = one.copy()
    slightly[:4] = ~slightly[:4]
    rows = [cell(tmp_path, "lora", one), cell(tmp_path, "full", right(1.2)), cell(tmp_path, "head", right(0.2))]
    rows += [cell(tmp_path, "near", slightly), cell(tmp_path, "twin", one)]
    found = {each.variant: each for each in compare_variants(rows)}
    assert [found[name].outcome for name in ("full", "head", "near", "twin")] == ["better", "worse", *["undecided"] * 2]
    points = 100 * (right(1.2).mean() - one.mean())
    assert found["full"].verdict.startswith(f"better than lora by {points:.1f} points [")
    assert found["head"].verdict.startswith("worse than lora by ")
    seen = f"{100 * found['near'].detectable:.1f}"
    assert found["near"].verdict == (
        f"not distinguishable from lora at n=1,000 and 1 seed; a difference of {seen} points would have been seen"
    )
    assert found["twin"].verdict == "the same as lora on every example"


def test_what_is_significant_alone_need_not_be_so_among_many(tmp_path: Path) -> None:
    one = right(0.8)
    changed = one.copy()
    wrong = np.flatnonzero(~one)[:13]
    changed[wrong] = True
    changed[np.flatnonzero(one)[:3]] = False  # 13 better, 3 worse: two-sided sign test p = 0.021
    rows = [cell(tmp_path, "lora", one), cell(tmp_path, "new", changed)]
    (alone,) = compare_variants(rows)
    assert alone.outcome == "better"
    rows += [cell(tmp_path, f"twin{i}", one) for i in range(9)]
    found = next(each for each in compare_variants(rows) if each.variant == "new")
    assert found.adjusted_p == pytest.approx(10 * found.p_value)
    assert found.outcome == "undecided"
    assert found.verdict.endswith("if compared alone, not as one of 10 comparisons (Holm)")


def test_a_lower_perplexity_is_better(tmp_path: Path) -> None:
    loss = np.random.default_rng(1).gamma(20.0, 1.0, 300)
    rows = [language_cell(tmp_path, "lora", loss.tolist()), language_cell(tmp_path, "full", (loss - 2).tolist())]
    (found,) = compare_variants(rows)
    assert found.value == pytest.approx(np.exp((loss.mean() - 2) / 10) - np.exp(loss.mean() / 10))
    assert found.outcome == "better"
    assert found.verdict.startswith(f"better than lora by {-found.value:.3g} in perplexity [")


def test_who_cannot_be_compared_is_left_out_with_the_reason(tmp_path: Path) -> None:
    bare = record(metrics={"accuracy": Metric(value=0.5, n=N)})
    relabelled = 1 - TRUTH
    rows = [
        *(cell(tmp_path, "lora", right(0.8)), cell(tmp_path, "full", right(0.9))),
        *(cell(tmp_path, "short", right(0.9)[:900]), cell(tmp_path, "flipped", right(0.9), truth=relabelled)),
        *(CellRow("bare", 0, tmp_path / "bare", bare), row("oom", record(status="oom", error="full"))),
    ]
    comparison = compare_rows(rows)
    assert [found.variant for found in comparison.differences] == ["full"]
    assert set(comparison.left_out) == {"short", "flipped", "bare", "oom"}
    assert comparison.left_out["short"] == "its 900 test rows are not the 1,000 of lora."
    assert "other labels than those of lora" in comparison.left_out["flipped"]
    assert "no predictions.jsonl" in comparison.left_out["bare"]
    assert comparison.left_out["oom"] == "no finished run (oom)."
    told = "\n".join(lines_of(rows))
    assert "short is not compared: its 900 test rows" in told
    assert "oom" not in told  # among what failed, in the table's notes
    assert "- **flipped** is not compared" in render_markdown(rows, comparison)


def test_nothing_is_compared_without_predictions_or_without_a_second_variant(tmp_path: Path) -> None:
    bare = record(metrics={"accuracy": Metric(value=0.5, n=N)})
    assert compare_variants([row("a", bare), row("b", bare)]) == []
    assert compare_variants([cell(tmp_path, "lora", right(0.8))]) == []
    assert "difference" not in render_markdown([row("a", bare), row("b", bare)], compare_rows([row("a", bare)]))


def test_a_terminals_lines_fit_80_columns(tmp_path: Path) -> None:
    one = right(0.8)
    names = ["full, training.learning_rate=0.0003", "few-shot, shots=16, seed=0, long", "twin of the reference, lora"]
    rows = [cell(tmp_path, "lora", one)] + [
        cell(tmp_path, n, right(x)) for n, x in zip(names, (0.7, -0.9, 0.8), strict=True)
    ]
    lines = lines_of(rows)
    assert lines[0] == "points of accuracy against lora, 1,000 examples and 1 seed in pairs:"
    assert max(map(cell_len, lines)) <= 80
    assert next(line for line in lines if line.startswith("twin")).endswith("the same on every example")
    assert "worse, p < 0.001" in next(line for line in lines if line.startswith("few-shot"))


def test_the_report_has_a_table_of_differences_and_their_csv(tmp_path: Path) -> None:
    rows = [
        cell(tmp_path / "cells", name, right(level)) for name, level in (("lora", 0.8), ("full", 1.2), ("head", 0.1))
    ]
    text = write_report(tmp_path, "s", rows, reference="head").read_text()
    assert "Points of accuracy against head, 1,000 examples and 1 seed in pairs." in text
    assert "p adjusted by Holm for 2 comparisons" in text
    assert "[differences.csv](differences.csv)" in text
    with (tmp_path / "differences.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["variant"], first["outcome"], second["variant"]) == ("full", "better", "lora")
    assert float(first["value"]) == pytest.approx(right(1.2).mean() - right(0.1).mean())
    assert "better than head by" in first["verdict"]
    write_report(tmp_path, "s", rows[:1])
    assert not (tmp_path / "differences.csv").exists()


def test_a_csv_of_no_differences_has_its_columns(tmp_path: Path) -> None:
    write_differences(compare_rows([]), tmp_path / "d.csv")
    assert (tmp_path / "d.csv").read_text().startswith("variant,reference,metric,value,low,high,p_value,adjusted_p,")


def test_a_variants_interval_is_over_seeds_and_examples(tmp_path: Path) -> None:
    rows = [cell(tmp_path, "lora", right(0.8, seed), seed) for seed in range(3)]
    score = summarise(rows)[0].score
    assert score is not None
    assert score.basis == "seeds and examples"
    assert score.value == pytest.approx(np.mean([right(0.8, seed).mean() for seed in range(3)]))
    # seeds that differ in little but the rest: about the interval of one run, where Student's t over seeds is as wide
    # as chance makes it
    spread = np.sqrt(score.value * (1 - score.value) / N)
    assert score.low is not None
    assert 0.8 * 1.96 * spread < score.value - score.low < 2 * 1.96 * spread
    assert (score.chance, score.majority) == (0.5, pytest.approx(max(TRUTH.mean(), 1 - TRUTH.mean())))
    table = render_markdown(rows)
    assert "a hierarchical bootstrap over seeds and examples" in table
    assert f"| majority | {score.majority:.3f} |" in table


def test_two_runs_are_compared_by_the_names_of_their_folders(tmp_path: Path) -> None:
    cell(tmp_path, "old", right(0.9))
    cell(tmp_path, "new", right(0.2))
    comparison = compare_folders(tmp_path / "old-seed0", tmp_path / "new-seed0")
    assert [(found.variant, found.reference) for found in comparison.regressions] == [("new-seed0", "old-seed0")]
    assert not compare_folders(tmp_path / "new-seed0", tmp_path / "old-seed0").regressions


def test_another_metric_can_decide(tmp_path: Path) -> None:
    for name, level in (("old", 0.9), ("new", 0.2)):
        cell(tmp_path, name, right(level))
    found = compare_folders(tmp_path / "old-seed0", tmp_path / "new-seed0", "mcc")
    assert found.regressions[0].verdict.startswith(f"worse than old-seed0 by {-found.differences[0].value:.3g} in mcc")
    with pytest.raises(InputError, match="and not 'macro_f'; did you mean 'macro_f1'"):
        compare_folders(tmp_path / "old-seed0", tmp_path / "new-seed0", "macro_f")
