"""What is written into the self-contained page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from made_up import accuracy, record, row, trained
from made_up_page import HOSTILE, small_document
from report_page import TEN, compare, make_cells

from peftkit.files import write_json_lines
from peftkit.record import read_predictions
from peftkit.report import page_examples
from peftkit.report.page import render_page, write_page
from peftkit.report.page_curves import MOST_POINTS, cell_curves
from peftkit.report.page_data import page_document
from peftkit.report.rows import CellRow


def document_in(page: str) -> dict[str, Any]:
    """The data block, ended where a browser would end it."""
    _, _, rest = page.partition('<script type="application/json" id="data">')
    found: dict[str, Any] = json.loads(rest.partition("</script>")[0])
    return found


def test_no_string_can_end_the_block_of_data_or_write_markup() -> None:
    rows = [row(HOSTILE, record(error=HOSTILE, status="failed")), row("lora", trained(0.8))]
    document = page_document(Path(HOSTILE), HOSTILE, rows, [], description=HOSTILE)
    page = render_page(document)
    assert document_in(page) == document
    assert page.count("<script") == 2  # the data and the program
    assert page.count("<img") == 0
    assert f"<title>{html.escape(HOSTILE)} – peftkit report</title>" in page


def test_the_policy_allows_this_style_and_this_script_alone() -> None:
    page = render_page(small_document([row("lora", trained(0.8))]))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    digests = [
        "'sha256-" + base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() + "'" for t in (style, script)
    ]
    assert html.unescape(policy).startswith(f"default-src 'none'; style-src {digests[0]}; script-src {digests[1]};")
    assert not re.search(r"\sstyle=|\son\w+=", page.partition("<script")[0]), "inline styles and handlers are refused"


def test_the_page_names_no_other_place() -> None:
    page = render_page(small_document([row("lora", trained(0.8))]))
    assert set(re.findall(r"https?://[^\s\"'`)]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|innerHTML|eval\(", page)


def test_the_same_rows_give_the_same_page(tmp_path: Path) -> None:
    rows = make_cells(tmp_path, {"lora": TEN["lora"], "full": TEN["full"]}, seeds=2, examples=20)
    pages = [write_page(tmp_path / name, "same", rows, compare(rows)).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_writing_the_page_loads_neither_torch_nor_a_plotting_library() -> None:
    code = "import sys, peftkit.report.page; sys.exit(any(n in sys.modules for n in ('torch', 'matplotlib', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_fifty_cells_of_a_thousand_examples_stay_below_a_tenth_of_15_mb(tmp_path: Path) -> None:
    (cell,) = make_cells(tmp_path, {"lora": TEN["lora"]}, seeds=1, examples=1000, failures=False)
    rows = [CellRow(f"lora, rank={i}", seed, cell.folder, cell.record) for i in range(10) for seed in range(5)]
    page = write_page(tmp_path, "large", rows, [])
    assert sum(each["examples"] is not None for each in document_in(page.read_text(encoding="utf-8"))["cells"]) == 50
    assert page.stat().st_size < 1.5e6  # so that 500 cells, style and script counted ten times, stay below 15 MB


def test_predictions_that_cannot_be_read_leave_the_rest_of_the_page_whole(tmp_path: Path) -> None:
    rows = make_cells(tmp_path, {"lora": TEN["lora"]}, seeds=3, examples=20, failures=False)
    (rows[0].folder / "predictions.jsonl").write_text('{"row": 0, "label": 1, "pred', encoding="utf-8")
    write_json_lines(rows[1].folder / "predictions.jsonl", [{"row": 0, "something": "else"}])
    document = small_document(rows)
    assert [cell["examples"] is None for cell in document["cells"]] == [True, True, False]
    assert all(cell["metrics"] for cell in document["cells"])


def test_answers_are_kept_whole_and_probabilities_to_one_part_in_255(tmp_path: Path) -> None:
    (cell,) = make_cells(tmp_path, {"lora": TEN["lora"]}, seeds=1, examples=50, failures=False)
    (examples,) = page_examples.collect_examples([cell]).columns
    (shared,) = page_examples.collect_examples([cell]).sets
    assert examples is not None
    written = read_predictions(cell.folder)
    assert [*base64.b64decode(shared["label"])] == [each["label"] for each in written]
    assert [*base64.b64decode(examples["answer"])] == [each["prediction"] for each in written]
    kept = [byte / 255 for byte in base64.b64decode(examples["truth"])]
    assert kept == pytest.approx([each["scores"][each["label"]] for each in written], abs=0.5 / 255 + 1e-9)
    assert shared["names"] == ["negative", "positive"]


def test_cells_over_the_same_examples_share_rows_and_right_answers(tmp_path: Path) -> None:
    rows = make_cells(tmp_path, {"lora": TEN["lora"], "full": TEN["full"]}, seeds=2, examples=20, failures=False)
    found = page_examples.collect_examples(rows)
    assert len(found.sets) == 1
    assert [columns["set"] for columns in found.columns if columns] == [0, 0, 0, 0]


def test_more_predictions_than_the_budget_are_thinned_alike_in_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_cells(tmp_path, {"lora": TEN["lora"], "full": TEN["full"]}, seeds=1, examples=40, failures=False)
    monkeypatch.setattr(page_examples, "BUDGET_BYTES", 110)  # 2 cells of 40 examples of 4 bytes: 320, thrice as much
    found = page_examples.collect_examples(rows)
    assert (found.stride, found.sets[0]["size"]) == (3, 14)  # rows 0, 3, ..., 39
    assert "rows" not in found.sets[0]


def test_a_long_log_is_thinned_and_a_torn_or_repeated_line_does_no_harm(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "epoch": step / 500, "loss": 1.0 / step}) for step in range(1, 1001)]
    lines[5:5] = [json.dumps({"step": 5, "epoch": 0.01, "loss": 9.0})]  # a run that was taken up again at step 5
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 1001, "lo', encoding="utf-8")
    curves = cell_curves(tmp_path, record(history=[{"step": 1000, "epoch": 2.0, "loss": 0.3, "accuracy": 0.8}]))
    training = curves["training"]
    assert len(training["step"]) == len(training["loss"]) == MOST_POINTS
    assert training["step"][-1] == 1000
    assert training["loss"][-1] == pytest.approx(sum(1 / step for step in range(996, 1001)) / 5, rel=1e-5)
    assert training["loss"][0] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 9.0) / 5, rel=1e-5)
    assert curves["validation"] == {"step": [1000], "loss": [0.3], "accuracy": [0.8]}
    assert curves["epochs_per_step"] == pytest.approx(1 / 500)


def test_many_labels_are_kept_as_right_or_wrong(tmp_path: Path) -> None:
    many = [0] * 99 + [1]
    answers = [
        {"row": i, "label": many, "prediction": given, "scores": [], "loss": 1.0}
        for i, given in enumerate((many, [0] * 100))
    ]
    write_json_lines(tmp_path / "predictions.jsonl", answers)
    (columns,) = page_examples.collect_examples([CellRow("x", 0, tmp_path, record(metrics=accuracy(0.5, n=2)))]).columns
    assert columns is not None
    assert struct.unpack("<2B", base64.b64decode(columns["right"])) == (1, 0)
