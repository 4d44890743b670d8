"""What the page shows besides one's own scores: advice, what only some machines measure, and the runs of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from browsing import Reader
from made_up import record, row, trained
from made_up_page import HOSTILE, small_document

from peftkit.report.page_data import page_document
from peftkit.report.rows import Outside


def test_the_advice_is_read_under_the_title(reader: Reader, opened: Callable[[dict[str, Any]], Path]) -> None:
    document = small_document([row("lora", trained(0.8)), row("full", record(status="oom", error="no room"))])
    assert document["advice"][0]["variant"] == "lora"
    reader.open(opened(document))
    assert reader.texts(".advice h2") == [document["advice"][0]["headline"]]
    sentences = [*document["advice"][0]["why"], *document["advice"][0]["given_up"], *document["advice"][0]["cautions"]]
    assert reader.texts(".advice dd") == sentences
    assert "full has no result here: oom, no room." in sentences


def test_what_only_some_machines_measure_has_a_column_and_a_cost_where_it_was_measured(
    reader: Reader, opened: Callable[[dict[str, Any]], Path]
) -> None:
    measured = {
        "inference": {"merged": {"samples_per_second": 20.0, "latency_seconds_p50": 0.05}},
        "energy": {"joules": 2500.0, "source": "rapl", "seconds": 9.0},
    }
    rows = [replace(row("lora", trained(0.8)), outside=Outside("here", measured, ())), row("full", trained(0.9))]
    document = small_document([replace(rows[0], outside=None), rows[1]])
    assert document["variants"][0]["samples_per_second"] is None
    reader.open(opened(document))
    assert reader.texts('#runs [data-key="served"], #tradeoffs input[value=energy] + label') == []
    found = page_document(Path("x"), "imported", rows[:1], [])
    found["outside"] = None
    reader.open(opened(found))
    assert reader.texts("#runs thead th")[-3:] == ["Answers/s", "Latency", "Energy"]
    assert reader.texts("#runs tbody td")[-3:] == ["20", "50ms", "2.5 kJ"]
    reader.find("#tradeoffs input[value=energy] + label").click()
    assert "energy of the training" in reader.until("return document.querySelector('#tradeoffs svg title').textContent")
    reader.run("document.querySelector('#runs tbody button').click()")
    assert "merged latency seconds p50" in reader.texts("dialog th")
    assert reader.messages() == []


def test_what_others_measured_stands_apart_with_what_is_not_comparable(
    reader: Reader, opened: Callable[[dict[str, Any]], Path]
) -> None:
    theirs = replace(row("lora/llama", trained(0.48)), outside=Outside(HOSTILE, {}, ("one seed each", HOSTILE)))
    reader.open(opened(page_document(Path("x"), "both", [row("lora", trained(0.8)), theirs], [])))
    assert reader.texts("#runs tbody th") == ["lora"]
    assert reader.texts("#outside tbody th") == ["lora/llama"]
    assert reader.texts("#outside tbody td")[:2] == ["0.480 [0.460, 0.510]", "1.5k"]
    assert reader.texts("#outside > ul li") == ["one seed each", HOSTILE]
    reader.open(opened(page_document(Path("x"), "alone", [theirs], [])))
    assert reader.texts("#outside, nav a[href='#outside']") == []
    assert reader.texts(".imported li") == ["one seed each", HOSTILE]
    assert reader.texts("#runs tbody th") == ["lora/llama"]
    assert reader.run("return [window.hacked, document.images.length]") == [None, 0]
    assert reader.messages() == []
