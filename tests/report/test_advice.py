"""What is recommended, over rows whose right answer is seen at a glance."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from made_up import accuracy, record, row, trained
from rich.console import Console

from peftkit.files import write_json_lines
from peftkit.record import Parameters
from peftkit.report.advice import Advice, advice_markdown, render_advice
from peftkit.report.advice import advise as advise_all
from peftkit.report.method_comparison import SOURCE
from peftkit.report.rows import CellRow, Outside, summarise

N = 400
TUNED = {"trials": 8}


def cell(
    folder: Path, variant: str, wrong: Sequence[int], seed: int = 0, *, memory_mib: int = 100, seconds: float = 75.0
) -> CellRow:
    """A run on two balanced labels that gets all right but these; 75 s and so much memory over the baseline."""
    given = np.arange(N) % 2
    given[list(wrong)] = 1 - given[list(wrong)]
    answers = [{"row": i, "label": i % 2, "prediction": int(p), "scores": [0.5, 0.5]} for i, p in enumerate(given)]
    path = folder / f"{variant}-{seed}"
    write_json_lines(path / "predictions.jsonl", answers)
    found = trained(1 - len(wrong) / N, seed, memory_mib=memory_mib)
    assert found.throughput is not None
    throughput = found.throughput.model_copy(update={"train_seconds": seconds})
    return CellRow(variant, seed, path, found.model_copy(update={"throughput": throughput}), TUNED)


def seeds_of(folder: Path, variant: str, count: int, **cost: Any) -> list[CellRow]:
    """Three tuned seeds, each wrong on the first `count` examples and on one of its own."""
    return [cell(folder, variant, [*range(count), N - 1 - seed], seed, **cost) for seed in range(3)]


def advise(rows: Sequence[CellRow]) -> Advice:
    (advice,) = advise_all(rows)
    return advice


def untrained(cell: CellRow) -> CellRow:
    assert cell.record is not None
    parts = {"memory": None, "throughput": None, "parameters": Parameters(total=1000, trainable=0)}
    return replace(cell, record=cell.record.model_copy(update=parts))


def test_of_those_that_cannot_be_told_apart_the_cheapest_is_taken_and_what_it_gives_up_is_said(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "full", 20, memory_mib=1000, seconds=100)
    rows += seeds_of(tmp_path, "lora", 22, memory_mib=400, seconds=60)  # 24,000 MiB s, the least
    rows += seeds_of(tmp_path, "qlora", 22, memory_mib=250, seconds=150)  # 37,500: less memory, more time
    rows += seeds_of(tmp_path, "head", 120, memory_mib=50, seconds=20)  # 1,000, and 25 points worse
    advice = advise(rows)
    assert advice.variant == "lora"
    assert advice.headline == "On this machine: take lora."
    first, second = advice.why
    # 22 + 1 of 400 wrong
    assert first.startswith("It has accuracy 0.943 [")
    assert "not distinguishable from full at n=400 and 3 seeds; a difference of" in first
    assert second == (
        "Of the 3 that are not distinguishable from the best it is the cheapest by training memory x time: "
        "400.0 MiB of memory, 1m00s of training and 1.5k weights."
    )
    against, memory, worse = advice.given_up
    assert against.startswith("Against full, the best: -0.5 [")
    assert against.endswith("points of accuracy; full takes 2.5x the memory and 1.7x the time.")
    assert memory == "If memory is short: qlora, not distinguishable either, with 250.0 MiB."
    assert worse.startswith(
        "head is cheaper (50.0 MiB of memory, 20s of training and 1.5k weights) and worse than full"
    )
    assert advice.cautions == ()


def test_one_that_is_worse_alone_is_not_taken_because_many_were_compared(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "full", 20, memory_mib=1000)
    rows += [cell(tmp_path, "cheap", [*range(12, 46), N - 1 - seed], seed, memory_mib=50) for seed in range(3)]
    assert advise(rows).variant == "full"
    rows += [cell for name in "abcdefgh" for cell in seeds_of(tmp_path, name, 21, memory_mib=900)]
    advice = advise(rows)
    assert any("cheap" in each and "if compared alone" in each for each in advice.given_up), advice
    assert advice.variant == "a"


def test_one_whose_seeds_differ_widely_is_not_as_good_as_anything(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "full", 20, memory_mib=1000)
    rows += seeds_of(tmp_path, "head", 60, memory_mib=500)
    rows += [cell(tmp_path, "moody", [*range(wrong)], seed, memory_mib=10) for seed, wrong in enumerate((1, 2, 190))]
    advice = advise(rows)
    assert advice.variant == "full"
    assert any("seeds differ widely" in caution and "moody" in caution for caution in advice.cautions), advice


def test_a_clear_winner_is_taken_whatever_it_costs(tmp_path: Path) -> None:
    rows = [*seeds_of(tmp_path, "full", 10, memory_mib=1000), *seeds_of(tmp_path, "lora", 150, memory_mib=100)]
    advice = advise(rows)
    assert advice.variant == "full"
    assert advice.why[0].startswith("It has the best score: accuracy 0.973 [")
    assert advice.why[1].startswith("Every other method that was compared is worse.")
    assert advice.given_up[0].startswith("lora is cheaper (100.0 MiB of memory")


def test_training_nothing_is_the_cheapest_of_all_where_it_does_as_well(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "lora", 20, memory_mib=1)
    rows += [untrained(each) for each in seeds_of(tmp_path, "few-shot", 21)]
    advice = advise(rows)
    assert advice.variant == "few-shot"
    assert advice.why[1].endswith("the cheapest by training memory x time: no training at all.")


def test_a_cost_that_is_not_known_of_all_does_not_decide(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "lora", 20, memory_mib=400, seconds=50)
    bare = seeds_of(tmp_path, "full", 20, memory_mib=100, seconds=90)
    for each in bare:
        assert each.record is not None
        rows.append(replace(each, record=each.record.model_copy(update={"memory": None})))
    advice = advise(rows)
    assert advice.variant == "lora"
    assert "the cheapest by training time" in advice.why[1]


def test_few_seeds_failed_seeds_and_settings_that_were_not_searched_are_cautions(tmp_path: Path) -> None:
    alone = [cell(tmp_path, "lora", range(20)), replace(cell(tmp_path, "full", range(21)), tuned=None)]
    one, untuned = advise(alone).cautions
    assert one == "One seed says nothing about others: the order may change with the next one. Run seeds=[0, 1, 2]."
    assert untuned == "Tuned and untuned are not a fair match. Not tuned: full."
    none = advise([replace(each, tuned=None) for each in alone]).cautions
    assert none[-1].startswith("No method was tuned")
    rows = seeds_of(tmp_path, "lora", 20)
    rows[2] = CellRow("lora", 2, tmp_path / "gone", record(2, status="killed", error="SIGKILL"), TUNED)
    two, partial = advise(rows).cautions
    assert two.startswith("2 seeds say little")
    assert partial == "Not every seed ended well: lora (2 of 3)."


def test_what_does_not_run_here_and_what_could_not_be_compared_is_said(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "lora", 20)
    rows.append(row("full", record(status="oom", error="needs 27.4 GiB and the card has 24.0.")))
    rows.append(row("other", record(metrics=accuracy(0.5))))
    cautions = " ".join(advise(rows).cautions)
    assert "full has no result here: oom, needs 27.4 GiB and the card has 24.0." in cautions
    assert "Not compared: other, as" in cautions


def test_nothing_is_taken_where_guessing_may_do_as_well(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "lora", 196)  # 0.508 of two balanced labels
    advice = advise(rows)
    assert advice.variant is None
    assert advice.headline.endswith("take none of them yet.")
    assert "and guessing 0.500" in advice.why[0]


def test_one_that_may_be_guessing_is_left_aside_though_it_cannot_be_told_from_the_best(tmp_path: Path) -> None:
    scattered = [cell(tmp_path, "prompt", range(each), seed, memory_mib=1) for seed, each in enumerate((20, 300))]
    rows = [*[cell(tmp_path, "lora", range(100), seed) for seed in range(2)], *scattered]
    advice = advise(rows)
    assert advice.variant == "lora"
    assert "Left aside, as they cannot be told from guessing either: prompt." in advice.cautions


def test_different_machines_and_different_metrics_are_told(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "lora", 20)
    assert rows[0].record is not None
    moved = rows[0].record.model_copy(update={"environment": {"device_name": "NVIDIA L40S"}})
    named = [replace(rows[0], record=moved), *rows[1:]]
    assert advise(named).headline.startswith("On NVIDIA L40S: take")
    mixed = [row("a", record(metrics=accuracy(0.9))), row("b", record(metrics={"mcc": accuracy(0.5)["accuracy"]}))]
    assert advise(mixed).headline == "No recommendation: the methods were scored by different metrics."
    assert advise([row("a", None)]).headline == "No recommendation: nothing was scored."
    assert advise([row("a", None)]).cautions == ("a has no result here: missing, not run yet.",)


def test_each_test_split_has_its_own_answer(tmp_path: Path) -> None:
    rows = []
    for data, best, other in (("film", "lora", "full"), ("press", "full", "lora")):
        for variant, wrong in ((best, 10), (other, 150)):
            for each in seeds_of(tmp_path / data, variant, wrong):
                assert each.record is not None
                told = each.record.model_copy(update={"recipe": {"data": {"test": data}}})
                rows.append(replace(each, variant=f"{variant}, {data}", record=told))
    rows.append(row("lost", None))
    film, press = advise_all(rows)
    assert (film.variant, press.variant) == ("lora, film", "full, press")
    assert film.headline == "On this machine, film: take lora, film."
    assert "lost has no result here" in film.cautions[-1]
    order = [summary.variant for summary in summarise(rows)]
    assert order == ["lora, film", "full, film", "full, press", "lora, press", "lost"], "best first on each split"


def test_what_others_measured_is_never_recommended(tmp_path: Path) -> None:
    better = replace(cell(tmp_path, "published", []), outside=Outside(SOURCE, {}, ()))
    advice = advise([*seeds_of(tmp_path, "lora", 20), better])
    assert advice.variant == "lora"
    assert "published" not in str(advice)


def test_the_terminal_shows_every_sentence_and_markdown_escapes_names(tmp_path: Path) -> None:
    advice = advise(seeds_of(tmp_path, "a|b", 20))
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(render_advice([advice]))
    shown = " ".join(captured.get().split())
    assert advice.headline in shown
    assert "why It has the best score" in shown
    assert r"take a\|b." in advice_markdown([advice])


def test_the_document_has_every_part(tmp_path: Path) -> None:
    document = advise(seeds_of(tmp_path, "lora", 20)).to_document()
    assert list(document) == ["variant", "headline", "why", "given_up", "cautions"]
    assert json.loads(json.dumps(document)) == document
