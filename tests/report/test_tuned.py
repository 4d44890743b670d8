"""A report says who was tuned, and who was not."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from made_up import record, row, trained
from rich.console import Console

from peftkit.record import Parameters
from peftkit.report.document import write_report
from peftkit.report.rows import CellRow
from peftkit.report.tables import render_markdown, render_terminal

CHOSEN = {"training.learning_rate": 0.001}


def tuned(found: CellRow) -> CellRow:
    search = {"trials": 3, "metric": "accuracy", "seed": 1000, "chosen": CHOSEN, "value": 0.9}
    return replace(found, tuned=search)


ASKED = row("zero-shot", record(parameters=Parameters(total=1000, trainable=0)))
ROWS = [tuned(row("lora", trained(0.9))), row("full", trained(0.8)), ASKED]


def test_tuned_rows_are_marked_and_untuned_ones_that_train_are_named(tmp_path: Path) -> None:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(render_terminal(ROWS))
    write_report(tmp_path, "s", ROWS)
    texts = {"Tuned (*)": captured.get(), "Tuned (*): the": render_markdown(ROWS)}
    texts["Tuned:"] = (tmp_path / "report.html").read_text()
    for lead, text in texts.items():
        told = " ".join(text.split())
        assert lead in told
        assert "the best of 3 trials by validation accuracy; searched: training.learning_rate." in told
        assert "Not tuned, so no fair match for those: full." in told
    assert "lora*" in captured.get().replace("\\", "")
    assert "full*" not in captured.get()


def test_without_tuning_nothing_is_said_about_it() -> None:
    assert "uned" not in render_markdown([row("lora", trained(0.9)), row("full", trained(0.8))])
