"""SIGKILL at random moments, to harness and cell: the benchmark of it, on one cell."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_bench import SUITE, differences, disturb


@pytest.mark.slow
def test_killed_twice_a_suite_ends_with_the_results_of_an_undisturbed_one(tmp_path: Path) -> None:
    suite = SUITE | {"variants": {"lora": {}}, "seeds": [0]}
    found = disturb(suite, tmp_path, kills=2, seed=29, say=print)
    assert not found["faults"]
    assert sum(found["killed"].values()) == 2
    # the comparison is not blind: a changed answer and a torn file are seen
    (cell,) = (tmp_path / "calm" / "cells").glob("*/")
    predictions = cell / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"row": 0', '"row": 9', 1))
    assert differences(tmp_path / "calm", found["folder"]) == [f"{cell.name}: predictions differs"]
    (cell / "record.json").write_text("{")
    assert differences(tmp_path / "calm", found["folder"])
