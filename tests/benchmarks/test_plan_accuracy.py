"""`benchmarks/plan_accuracy.py` on rows that are not those it was written for."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plan_accuracy

from peftkit.plan.planner import recorded_margin

BENCHMARKS = Path(plan_accuracy.__file__).parent
T4, L40S = (BENCHMARKS / "reference" / f"{name}.csv" for name in ("t4_measured_runs", "l40s_published_runs"))
TINY = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 500,
}
MINIMAL = {
    "seq_len": "64",
    "batch": "2",
    "attn": "eager",
    "precision": "fp16",
    "quant": "none",
    "optimizer": "adamw",
    "lora_r": "8",
    "gc": "True",
}


def write(path: Path, like: Path, rows: list[dict[str, str]]) -> Path:
    """A table with the columns of another one, what a row lacks left empty."""
    with like.open(newline="") as file:
        columns = list(csv.DictReader(file).fieldnames or ())
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)
    return path


def answered(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: Any) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr(sys, "argv", ["plan_accuracy.py", "--json", *map(str, arguments)])
    plan_accuracy.main()
    printed = capsys.readouterr()
    document: dict[str, Any] = json.loads(printed.out)
    return document, printed.err


def test_rows_of_other_models_and_with_empty_cells_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rows = [
        {"model": "x/gpt2-tiny", "targets": "c_attn|c_proj", "model_config": json.dumps(TINY)},
        {"model": "x/pythia-tiny", "targets": "query_key_value", "model_config": json.dumps(TINY), "gc": "False"},
        # full finetuning has no rank, and no targets; a count as some tables write it
        {"model": "x/llama-tiny", "lora_r": "", "model_config": json.dumps(TINY), "batch": "2.0"},
        {"model": "x/llama-tiny", "targets": "q_proj", "quant": "int8", "model_config": json.dumps(TINY)},
    ]
    t4 = write(tmp_path / "t4.csv", T4, [MINIMAL | row for row in rows])
    l40s = write(tmp_path / "l40s.csv", L40S, [])
    found, said = answered(monkeypatch, capsys, "--t4", t4, "--l40s", l40s)
    predicted = [row["allocated"]["predicted_bytes"] for row in found["t4"]["rows"][:3]]
    assert all(size > 0 for size in predicted)
    assert "measured_bytes" not in found["t4"]["rows"][0]["allocated"]
    assert "int8" in found["t4"]["rows"][3]["trouble"]
    assert "int8" in said
    # nothing was measured, so there is no error to take a mean of
    assert "allocated" not in found["t4"]
    assert found["l40s"] == {"rows": []}


def test_a_measured_row_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    row = MINIMAL | {"model": "x/llama-tiny", "targets": "q_proj", "model_config": json.dumps(TINY)}
    t4 = write(tmp_path / "t4.csv", T4, [row | {"peak_allocated_mib": "50"}])
    found, _ = answered(monkeypatch, capsys, "--t4", t4, "--l40s", write(tmp_path / "l40s.csv", L40S, []))
    (shown,) = found["t4"]["rows"]
    error = shown["allocated"]["predicted_bytes"] / (50 * 2**20) - 1
    assert found["t4"]["allocated"] == {"mean_abs_error": abs(error), "worst_abs_error": abs(error)}
    assert "reserved" not in found["t4"]


@pytest.mark.parametrize(
    ("kind", "files", "column"),
    [("cuda", ("t4", "l40s"), "error reserved"), ("cpu", ("host",), "error of it")],
)
def test_the_planners_margin_is_its_largest_underestimate(kind: str, files: tuple[str, ...], column: str) -> None:
    documents = [json.loads((BENCHMARKS / "results" / "plan-accuracy" / f"{name}.json").read_text()) for name in files]
    errors = [float(re.sub("[%+]", "", row[column])) / 100 for document in documents for row in document["rows"]]
    # the table has two digits of a per cent
    assert recorded_margin(kind) == pytest.approx(max(0.0, -min(errors)), abs=6e-5)
