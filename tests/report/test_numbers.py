"""Every number of every cell as CSV and as Parquet; and what only some machines measure."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from made_up import row, trained
from pyarrow import parquet

from peftkit.files import write_json
from peftkit.record import RunRecord
from peftkit.report.numbers import write_csv, write_parquet
from peftkit.report.rows import CellRow, Outside, read_cells, summarise
from peftkit.report.tables import render_markdown
from peftkit.units import MIB


def with_parts(row: CellRow, **measured: Any) -> CellRow:
    """The row with parts that its record may not have a place for yet."""
    return CellRow(row.variant, row.seed, row.folder, row.record, outside=Outside("here", measured, ()))


def served(latency: float) -> dict[str, Any]:
    return {"samples_per_second": 1 / latency, "latency_seconds_p50": latency, "latency_seconds_p90": 2 * latency}


def test_parquet_holds_the_table_of_the_csv_with_types_and_nulls(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"targets": "all-linear"}, {"targets": ["q", "v"], "flag": True}]
    first, second = (
        CellRow(f"v{i}", i, tmp_path / f"v{i}", trained(0.8 + i / 10, i).model_copy(update={"recipe": settings[i]}))
        for i in range(2)
    )
    rows = [first, second, row("c", None)]
    write_csv(rows, tmp_path / "results.csv")
    write_parquet(rows, tmp_path / "results.parquet")
    table = parquet.read_table(tmp_path / "results.parquet")
    with (tmp_path / "results.csv").open(newline="") as file:
        assert table.column_names == csv.DictReader(file).fieldnames
    kinds = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert (kinds["memory.peak_bytes"], kinds["metrics.accuracy.value"]) == ("int64", "double")
    assert (kinds["recipe.flag"], kinds["recipe.targets"], kinds["seed"]) == ("bool", "string", "int64")
    columns = table.to_pydict()
    assert columns["memory.peak_bytes"] == [400 * MIB, 400 * MIB, None]
    assert columns["recipe.targets"] == ["all-linear", "['q', 'v']", None]
    assert columns["status"] == ["ok", "ok", "missing"]


def test_inference_and_energy_are_averaged_and_shown_where_they_were_measured() -> None:
    measured = [
        with_parts(
            row("lora", trained(0.8, seed), seed),
            inference={"adapter": served(0.5), "merged": served(latency)},
            energy={"joules": joules, "source": "rapl", "seconds": 9.0},
        )
        for seed, latency, joules in ((0, 0.1, 1000.0), (1, 0.3, 2000.0))
    ]
    (summary,) = summarise(measured)
    assert summary.inference["adapter"]["latency_seconds_p50"] == 0.5
    assert summary.served["latency_seconds_p50"] == pytest.approx(0.2)  # merged, as that is what is deployed
    assert summary.energy_joules == 1500
    header, _, line = render_markdown([*measured, row("head", trained(0.7))]).splitlines()[:3]
    assert "| answers/s | latency p50 | latency p90 | energy | seeds |" in header
    # mean of 10 and 3.33 answers a second; of 0.1 and 0.3 s
    assert "| 7 | 0.2s | 0.4s | 1.5 kJ | 2/2 |" in line
    assert "energy" not in render_markdown([row("head", trained(0.7))])


def suite(folder: Path, record: RunRecord, target: float) -> CellRow:
    record.write(folder / "cells" / "a-seed0")
    cells = [{"name": "a-seed0", "variant": "a", "seed": 0, "recipe_digest": record.recipe_digest}]
    write_json(folder / "cells.json", {"suite": "s", "target_score": target, "cells": cells})
    (found,) = read_cells([folder])
    return found


def test_the_time_to_a_target_is_that_of_the_first_scoring_that_reached_it(tmp_path: Path) -> None:
    history = [
        {"step": step, "epoch": step / 10, "train_seconds": 2.5 * step, "loss": 0.5, "accuracy": accuracy}
        for step, accuracy in ((10, 0.6), (20, 0.7), (30, 0.75))
    ]
    run = trained(0.8).model_copy(update={"history": history})
    assert suite(tmp_path / "reached", run, 0.7).target_seconds() == pytest.approx(50)
    assert suite(tmp_path / "missed", run, 0.9).target_seconds() is None
    losses = run.model_copy(
        update={"history": [{"step": s, "train_seconds": 9.0 * s, "loss": 3.0 - s} for s in (1, 2)]}
    )
    assert suite(tmp_path / "loss", losses, 1.5).target_seconds() == pytest.approx(18)
    untimed = run.model_copy(update={"history": [{"step": 1, "accuracy": 0.9}]})
    assert suite(tmp_path / "untimed", untimed, 0.7).target_seconds() is None
    assert "| to target |" in render_markdown([suite(tmp_path / "shown", run, 0.7)])


def test_two_seeds_that_differ_give_no_share_beyond_what_shares_can_be() -> None:
    (summary,) = summarise([row("a", trained(value, seed), seed) for seed, value in enumerate((0.6, 0.9))])
    assert summary.score is not None
    assert (summary.score.low, summary.score.high) == (0.0, 1.0)  # Student's t at one degree: 0.75 +- 1.9


def test_what_a_search_chose_comes_with_the_row(tmp_path: Path) -> None:
    trained(0.8).write(tmp_path / "cells" / "a-seed0")
    cells = [{"name": "a-seed0", "variant": "a", "seed": 0, "recipe_digest": "0" * 16, "tuned": {"trials": 8}}]
    write_json(tmp_path / "cells.json", {"suite": "s", "cells": cells})
    (found,) = read_cells([tmp_path])
    assert found.tuned == {"trials": 8}
