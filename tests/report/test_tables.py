"""What the rows of a benchmark become: summaries, a terminal table, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from made_up import accuracy, record, row, trained
from rich.console import Console

from peftkit.errors import InputError
from peftkit.files import write_json
from peftkit.record import Metric
from peftkit.report.numbers import write_csv
from peftkit.report.rows import CellRow, as_documents, find_cells, read_cells, summarise
from peftkit.report.tables import escape_markdown, render_markdown, render_terminal
from peftkit.units import MIB


def printed(rows: list[CellRow], *, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(render_terminal(rows))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_seeds_are_averaged_with_students_interval() -> None:
    (summary,) = summarise([row("lora", trained(value, seed), seed) for seed, value in enumerate((0.86, 0.87, 0.88))])
    score = summary.score
    assert score is not None
    assert score.value == pytest.approx(0.87)
    # s = 0.01 over three seeds; t(2) at 97.5 % is 0.95 sqrt(2 / (4 x .975 x .025)) = 4.3027.
    half = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)) * 0.01 / math.sqrt(3)
    assert (score.low, score.high, score.basis) == (pytest.approx(0.87 - half), pytest.approx(0.87 + half), "seeds")


def test_one_seed_and_seeds_that_agree_keep_the_interval_over_examples() -> None:
    for values in ([0.8], [0.8, 0.8, 0.8]):
        (summary,) = summarise(
            [row("zero-shot", record(seed, metrics=accuracy(v)), seed) for seed, v in enumerate(values)]
        )
        score = summary.score
        assert score is not None
        assert (score.value, score.low, score.high, score.basis) == (0.8, 0.8 - 0.02, 0.8 + 0.03, "examples")


def test_memory_is_counted_above_what_was_held_before_training() -> None:
    (summary,) = summarise(
        [row("lora", trained(0.8, 0, memory_mib=100), 0), row("lora", trained(0.9, 1, memory_mib=140), 1)]
    )
    assert summary.memory_bytes == 120 * MIB
    assert summary.peak_bytes == 420 * MIB


def test_summaries_come_best_first_and_failures_last() -> None:
    rows = [row("x", record(status="oom", error="no")), row("low", trained(0.7)), row("high", trained(0.9))]
    assert [summary.variant for summary in summarise(rows)] == ["high", "low", "x"]


def test_a_lower_perplexity_is_better() -> None:
    rows = [row(name, record(metrics={"perplexity": Metric(value=v, n=9)})) for name, v in (("a", 12.0), ("b", 8.0))]
    assert [summary.variant for summary in summarise(rows)] == ["b", "a"]


def test_the_metric_that_the_recipe_asks_for_comes_first() -> None:
    metrics = {**accuracy(0.8), "mcc": Metric(value=0.6, n=400)}
    asked = record(metrics=metrics).model_copy(update={"recipe": {"evaluation": {"metric": "mcc"}}})
    assert list(summarise([row("a", record(metrics=metrics))])[0].metrics) == ["accuracy", "mcc"]
    assert list(summarise([row("a", asked)])[0].metrics) == ["mcc", "accuracy"]


def test_without_a_test_split_the_validation_score_is_shown_as_such() -> None:
    (summary,) = summarise([row("a", record(validation_metrics=accuracy(0.8)))])
    assert summary.main == "validation accuracy"


def test_the_terminal_table_fits_80_columns_with_every_number_whole() -> None:
    rows = [row("lora, training.learning_rate=0.0003", trained(0.8123)), row("full", trained(0.9, memory_mib=1000))]
    lines = printed(rows)
    assert max(map(len, lines)) <= 80
    # 1,500 parameters, 1000 MiB, 5,000 tokens a second, 75 s
    assert next(line.split() for line in lines if "full" in line) == [
        *("full", "0.900", "[0.880,", "0.930]", "1.5k", "1000.0", "MiB", "5k", "1m15s")
    ]
    long = next(line for line in lines if "0.812" in line)
    assert long.split("  ")[0].strip() == "lora, trai…te=0.0003"  # 20 characters: 10, the sign, 9
    assert any(line.split() == ["chance", "0.500"] for line in lines)


def test_the_terminal_table_says_what_failed_and_why_seed_by_seed() -> None:
    reason = "method 'oft' needs in_features divisible by 32. Use lora."
    rows = [row("oft", record(seed, status="failed", error=reason), seed) for seed in (0, 1)]
    rows += [row("lora", trained(0.8)), row("lora", record(1, status="killed", error="SIGKILL"), 1), row("ia3", None)]
    text = " ".join(" ".join(printed(rows)).split())
    assert f"oft failed, seeds 0, 1: {reason}" in text
    assert "lora (1/2) 0.800" in text
    assert "lora killed, seed 1: SIGKILL" in text
    assert "ia3 missing, seed 0: not run yet" in text


def test_markup_in_a_name_is_printed_as_it_is() -> None:
    assert any("[red]x[/]" in line for line in printed([row("[red]x[/]", trained(0.8))]))


def test_the_markdown_table_is_this_one() -> None:
    rows = [
        row("lora", trained(0.8)),
        row("zero-shot", record(metrics=accuracy(0.5))),
        row("oft", record(status="oom", error="full")),
    ]
    assert render_markdown(rows) == (
        "| variant | accuracy | trained | memory | peak | tokens/s | time | seeds |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|\n"
        "| lora | 0.800 [0.780, 0.830] | 1.5k | 100.0 MiB | 400.0 MiB | 5k | 1m15s | 1/1 |\n"
        "| zero-shot | 0.500 [0.480, 0.530] | – | – | – | – | – | 1/1 |\n"
        "| oft | oom | – | – | – | – | – | 0/1 |\n"
        "| chance | 0.500 |  |  |  |  |  |  |\n"
        "\n"
        "Scored on 400 examples; 95 % intervals: a bootstrap over examples.\n"
        "memory: peak of the training steps above what was held before them; time: those steps alone.\n"
        "\n"
        "- **oft** oom: seed 0: full\n"
    )


def test_markdown_escapes_what_would_break_the_table_or_become_markup() -> None:
    table = render_markdown([row("a|b\n<script>*x*", trained(0.8)), row("c", record(status="failed", error="x | <b>"))])
    first = table.splitlines()[2]
    assert first.startswith(r"| a\|b &lt;script&gt;\*x\* | 0.800")
    assert first.replace(r"\|", "").count("|") == table.splitlines()[0].count("|")
    assert r"x \| &lt;b&gt;" in table
    assert escape_markdown(r"a\|b") == r"a\\\|b"


def test_csv_has_a_line_a_cell_with_every_number_and_parses_back(tmp_path: Path) -> None:
    rows = [row('say "x", y\nz', trained(0.8125, 3), 3), row("b", record(status="failed", error="why")), row("c", None)]
    write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second, third = csv.DictReader(file)
    assert (first["variant"], first["seed"], first["status"]) == ('say "x", y\nz', "3", "ok")
    assert float(first["metrics.accuracy.value"]) == 0.8125
    assert int(first["memory.peak_bytes"]) == 400 * MIB
    assert float(first["throughput.tokens_per_second"]) == 5000
    assert first["recipe.method.rank"] == "8"
    assert (second["status"], second["reason"], second["metrics.accuracy.value"]) == ("failed", "why", "")
    assert (third["status"], third["recipe.method.rank"]) == ("missing", "")


def test_a_suite_folder_is_read_in_its_own_order_and_without_the_cells_of_another_suite(tmp_path: Path) -> None:
    for name in ("b-seed0", "a-seed0", "old-seed0", "changed-seed0"):
        trained(0.8).write(tmp_path / "cells" / name)
    listed = [("b-seed0", "B", "0123456789abcdef"), ("a-seed0", "A", "0123456789abcdef"), ("new-seed0", "N", "0" * 16)]
    listed.append(("changed-seed0", "C", "f" * 16))
    cells = [{"name": name, "variant": variant, "seed": 0, "recipe_digest": digest} for name, variant, digest in listed]
    write_json(tmp_path / "cells.json", {"suite": "s", "cells": cells})
    found = [(row.variant, row.status) for row in read_cells([tmp_path])]
    assert found == [("B", "ok"), ("A", "ok"), ("N", "missing"), ("C", "missing")]
    assert [(row.variant, row.status) for row in read_cells(find_cells(tmp_path))] == found


def test_runs_are_found_below_a_folder_and_named_by_their_label(tmp_path: Path) -> None:
    trained(0.8).write(tmp_path / "runs" / "one")
    assert find_cells(tmp_path) == [tmp_path / "runs" / "one"]
    (found,) = read_cells([tmp_path / "runs" / "one"])
    assert (found.variant, found.status) == ("lora", "ok")
    assert as_documents([found])[0]["record"]["metrics"]["accuracy"]["value"] == 0.8


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        read_cells([tmp_path])
    with pytest.raises(InputError, match="not a folder"):
        find_cells(tmp_path / "nowhere")
    (tmp_path / "cells.json").write_text("{")
    with pytest.raises(InputError, match="not a list of a benchmark's cells"):
        read_cells([tmp_path])
