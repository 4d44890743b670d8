"""What a reader can do with the self-contained page, where a Chromium is at hand."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from browsing import Reader
from made_up import accuracy, record, row, trained
from made_up_page import HOSTILE, difference, small_document
from report_page import TEN, compare, make_cells, many_methods

from peftkit.files import write_json, write_json_lines
from peftkit.recipe import build_recipe, parse_yaml
from peftkit.record import read_predictions
from peftkit.report.page import write_page
from peftkit.report.page_data import page_document
from peftkit.report.rows import CellRow
from peftkit.units import MIB


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[CellRow]:
    return make_cells(tmp_path_factory.mktemp("cells"), TEN, seeds=2, examples=120)


@pytest.fixture(scope="module")
def page(rows: list[CellRow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page"), "nine methods", rows, compare(rows))


def test_it_opens_without_a_message_and_asks_for_nothing(reader: Reader, page: Path) -> None:
    reader.open(page)
    reader.run("window.scrollTo(0, document.documentElement.scrollHeight)")
    assert reader.messages() == []
    assert {url for url in reader.requests() if not url.startswith("data:")} == {page.absolute().as_uri()}
    for section in ("tradeoffs", "differences", "curves", "memory"):
        assert reader.run(f"return document.querySelector('#{section} svg[role=img] title').textContent"), section


def test_the_headline_tells_the_best_what_is_as_good_and_what_failed(
    reader: Reader, opened: Callable[[dict[str, Any]], Path]
) -> None:
    rows = [row("best", trained(0.90, memory_mib=400)), row("near", trained(0.89, memory_mib=100))]
    rows += [row("far", trained(0.70)), row("huge", record(status="oom", error="needs 27 GiB of 24"))]
    differences = [
        difference("near", "best", -0.01, "undecided", "not distinguishable"),
        difference("far", "best", -0.2, "worse", "worse by 20 points"),
    ]
    reader.open(opened(page_document(Path("runs/x"), "four", rows, differences)))
    said = " ".join(reader.texts(".verdict"))
    assert "best has the highest accuracy: 0.900 [0.880, 0.930]" in said
    assert "Not told apart from it: near." in said
    assert "Told apart: far." in said
    assert "On 400 examples, a true difference of 0.040 would have been seen four times in five." in said
    cards = dict(line.split("near", 1) for line in reader.texts(".card") if "near" in line)
    assert cards["Least memory"].startswith("100.0 MiBbest needs 4× as much")
    assert reader.texts(".failures li") == ["oom huge seed 0: needs 27 GiB of 24"]
    assert reader.texts("#differences svg .row-name") == ["near", "far"]
    assert reader.texts("#differences svg .row-value")[-1] == "▼ worse"
    labels = reader.run("return [...document.querySelectorAll('#differences .hit')].map((e) => e.ariaLabel)")
    assert "far minus best, accuracy −0.200 [−0.230, −0.170], worse by 20 points" in labels[1]


def test_what_was_compared_with_another_than_the_best_is_told_against_that(
    reader: Reader, opened: Callable[[dict[str, Any]], Path]
) -> None:
    rows = [row("best", trained(0.90)), row("lora", trained(0.85)), row("like", trained(0.84))]
    differences = [difference("best", "lora", 0.05, "better", ""), difference("like", "lora", -0.01, "undecided", "")]
    document = page_document(Path("x"), "three", rows, differences, left_out={"odd": "no finished run (oom)."})
    reader.open(opened(document))
    assert reader.texts(".verdict p")[1:] == ["Better than lora: best.", "Not told apart from lora: like."]
    assert reader.run("return document.querySelector('#differences details li').textContent") == (
        "odd: no finished run (oom)."
    )


def test_the_front_holds_what_no_other_method_beats_in_both(
    reader: Reader, opened: Callable[[dict[str, Any]], Path]
) -> None:
    points = {
        "cheap": (0.70, 50),
        "middle": (0.80, 100),
        "beaten": (0.75, 120),
        "top": (0.90, 300),
        "dear": (0.90, 400),
    }
    rows = [row(name, trained(score, memory_mib=mib)) for name, (score, mib) in points.items()]
    reader.open(opened(small_document(rows)))
    reader.find("#tradeoffs summary").click()
    reader.until("return document.querySelector('#tradeoffs .behind table')")
    names, on_front = reader.texts("#tradeoffs tbody th"), reader.texts("#tradeoffs tbody td:last-child")
    assert dict(zip(names, on_front, strict=True)) == {
        "cheap": "yes", "middle": "yes", "beaten": "no", "top": "yes", "dear": "no", "chance": "",
    }  # fmt: skip
    reader.find("#tradeoffs input[value=trainable] + label").click()
    assert "trained parameters" in reader.until("return document.querySelector('#tradeoffs svg title').textContent")


def test_a_header_sorts_both_ways_and_says_so_and_what_is_unknown_stays_last(reader: Reader, page: Path) -> None:
    reader.open(page)
    names = "#runs tbody th"
    assert reader.texts(names)[0] == "full"
    memory = reader.find('#runs [data-key="memory"]')
    memory.click()
    assert reader.texts(names)[0] == "head"  # 75 MiB
    assert reader.find('#runs th:has([data-key="memory"])').get_attribute("aria-sort") == "ascending"
    memory.send_keys("\ue007")  # Enter, from the keyboard
    assert reader.texts(names)[0] == "full"  # 964 MiB
    assert reader.find('#runs th:has([data-key="memory"])').get_attribute("aria-sort") == "descending"


def test_what_was_not_measured_comes_last_either_way(reader: Reader, opened: Callable[[dict[str, Any]], Path]) -> None:
    rows = [row("asked", record(metrics=accuracy(0.9))), row("large", trained(0.8))]
    rows.append(row("small", trained(0.7, memory_mib=10)))
    reader.open(opened(small_document(rows)))
    for order in (["small", "large", "asked"], ["large", "small", "asked"]):
        reader.find('#runs [data-key="memory"]').click()
        assert reader.texts("#runs tbody th") == order


def test_words_and_ends_filter_the_table(reader: Reader, page: Path) -> None:
    reader.open(page)
    reader.find("#filter").send_keys("lora rank=8")
    assert reader.texts("#runs tbody th") == ["lora, rank=8"]
    assert reader.texts("#runs .count") == ["1 of 10 methods"]
    reader.find("#filter").send_keys("\ue009a\ue009", "\ue003")  # select all, delete it
    reader.find("#runs input[value=runs] + label").click()
    reader.find("#runs [data-status=oom]").click()
    assert reader.texts("#runs tbody th") == ["lora, rank=256"]
    assert "27.4 GiB" in reader.texts("#runs tbody td:last-child")[0]


def test_points_tell_their_numbers_to_pointer_and_keyboard(reader: Reader, page: Path) -> None:
    reader.open(page)
    hits = reader.driver.find_elements("css selector", "#tradeoffs .hit")
    reader.hover(hits[0])
    first = reader.texts("#tip")[0]
    assert first.startswith("headaccuracy 0.")
    assert "memory" in first
    reader.run("arguments[0].focus()", hits[0])
    reader.press("\ue014")  # the right arrow
    assert reader.run("return document.activeElement === arguments[0]", hits[1])
    assert reader.texts("#tip")[0] != first
    assert hits[1].get_attribute("aria-label").startswith(reader.texts("#tip .tip-title")[0])
    reader.press("\ue00c")  # Escape
    assert reader.texts("#tip") == []


def test_curves_are_walked_with_the_arrow_keys_and_read_aloud(reader: Reader, page: Path) -> None:
    reader.open(page)
    reader.run("document.querySelector('.walker').focus()")
    reader.press("\ue014", "\ue014")
    assert re.fullmatch(r"full, seed 0, step 10, 0\.\d{3}", reader.texts("#announcer")[0])
    reader.press("\ue015")  # down: the next run
    assert reader.texts("#announcer")[0].startswith("full, seed 1, step 10")


def test_a_chip_hides_its_method_in_every_chart(reader: Reader, page: Path) -> None:
    reader.open(page)
    before = len(reader.texts("#differences svg .row-name"))
    chip = next(
        c for c in reader.driver.find_elements("css selector", "#tradeoffs .chip") if c.text.strip() == "prefix"
    )
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert len(reader.texts("#differences svg .row-name")) == before - 1
    assert "prefix" not in reader.texts("#memory svg .row-name")


def test_two_runs_are_compared_example_by_example(reader: Reader, page: Path, rows: list[CellRow]) -> None:
    reader.open(page)
    one, other = (next(r for r in rows if r.variant == name and r.seed == 0) for name in ("full", "prompt"))
    right = [[a["label"] == a["prediction"] for a in read_predictions(cell.folder)] for cell in (one, other)]
    reader.run(
        "for (const [run, name] of [['A', 'full · seed 0'], ['B', 'prompt · seed 0']]) {"
        "  const select = document.querySelector(`[data-run=${run}]`);"
        "  select.value = [...select.options].find((option) => option.textContent === name).value;"
        "  select.dispatchEvent(new Event('change'));"
        "}"
    )
    pairs = list(zip(*right, strict=True))
    counts = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
    assert reader.texts("#disagreements .tile b") == [str(count) for count in counts]
    reader.find("[data-kind=first]").click()
    shown = sorted(int(text) for text in reader.texts("#disagreements tbody th"))
    assert shown == [i for i, pair in enumerate(pairs) if pair == (True, False)][:50]


def test_the_dialog_has_the_command_and_a_recipe_that_builds_the_same_run(
    reader: Reader, page: Path, rows: list[CellRow]
) -> None:
    reader.open(page)
    next(b for b in reader.driver.find_elements("css selector", "#runs tbody button") if b.text == "dora").click()
    wanted = next(r for r in rows if r.variant == "dora" and r.seed == 0)
    assert wanted.record is not None
    command, recipe = (text.strip() for text in reader.run(
        "return [...document.querySelectorAll('dialog code')].map((e) => e.textContent)"
    ))  # fmt: skip
    assert command == f"peftkit train {wanted.folder}/recipe.yaml --out runs/again/{wanted.folder.name}"
    assert build_recipe(parse_yaml(recipe, where="dialog")).digest == wanted.record.recipe_digest
    assert "a card that does not exist" in reader.texts("dialog .settings td")
    reader.press("\ue00c")
    assert reader.run("return document.querySelector('dialog').open") is False


def test_hostile_names_are_shown_and_do_nothing(
    reader: Reader, tmp_path: Path, opened: Callable[[dict[str, Any]], Path]
) -> None:
    cells = make_cells(tmp_path, {HOSTILE.replace("/", "|"): TEN["lora"], "full": TEN["full"]}, seeds=2, examples=20)
    recipe = {
        "task": {"kind": HOSTILE, "labels": [HOSTILE, "ok"]},
        "__proto__": {"hacked": 1},
        HOSTILE: "a: b #",
        "a: b #": HOSTILE,
    }
    cells = [
        CellRow(f"{HOSTILE}{i}", c.seed, c.folder, c.record.model_copy(update={"recipe": recipe, "label": HOSTILE}))
        for i, c in enumerate(cells)
        if c.record is not None
    ]
    cells.append(row(HOSTILE, record(status="failed", error=HOSTILE)))
    one, other = cells[0].variant, cells[1].variant
    differences = [difference(one, other, 0.1, "better", HOSTILE)]
    left_out = {HOSTILE: HOSTILE}
    document = page_document(tmp_path, HOSTILE, cells, differences, description=HOSTILE, left_out=left_out)
    reader.open(opened(document))
    for summary in reader.driver.find_elements("css selector", "main summary"):
        reader.run("arguments[0].click()", summary)
    for hit in reader.driver.find_elements("css selector", "#tradeoffs .hit"):
        reader.run("arguments[0].focus()", hit)
    reader.run("document.querySelector('#runs tbody button').click()")
    assert reader.texts("h1") == [HOSTILE]
    assert any(HOSTILE in text for text in reader.texts("dialog td"))
    told = reader.run("return [...document.querySelectorAll('dialog code')].at(-1).textContent")
    assert parse_yaml(told, where="dialog") == recipe
    assert reader.run("return [window.hacked, ({}).hacked, document.images.length]") == [None, None, 0]
    assert reader.messages() == []


def test_the_page_is_dark_when_asked_by_the_system_or_by_the_button(reader: Reader, page: Path) -> None:
    def ground() -> int:
        colour = reader.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    reader.open(page)
    light = ground()
    reader.emulate(scheme="dark")
    assert ground() < 100 < 600 < light
    reader.until("return document.querySelector('#theme').getAttribute('aria-pressed') === 'true'")
    reader.run("document.querySelector('#theme').focus()")
    reader.press("\ue00d")  # the space bar
    assert ground() == light
    assert reader.find("#theme").get_attribute("aria-pressed") == "false"
    reader.run("localStorage.clear()")


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_sticks_out_sideways_on_a_small_screen(reader: Reader, page: Path, width: int) -> None:
    reader.open(page, width=width)
    assert reader.run("return document.documentElement.scrollWidth") <= width
    reader.find("#runs input[value=runs] + label").click()
    reader.run("document.querySelector('#runs tbody button').click()")
    assert reader.run("return document.documentElement.scrollWidth") <= width


def test_on_paper_controls_are_gone_charts_fit_and_the_recipe_is_open(reader: Reader, page: Path) -> None:
    reader.open(page, scheme="dark")
    reader.run(
        "window.addEventListener('beforeprint', () => { window.paper = ["
        "  document.querySelector('#tradeoffs .chart svg').getAttribute('viewBox'),"
        "  document.querySelector('#setup details').open]; })"
    )
    assert len(base64.b64decode(reader.command("Page.printToPDF", printBackground=True)["data"])) > 20_000
    assert reader.run("return window.paper") == ["0 0 690 460", True]
    reader.emulate(media="print", scheme="dark")
    assert reader.texts("#theme, .copy, #filter") == []
    assert reader.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert reader.run("return getComputedStyle(document.body).color") == "rgb(22, 25, 29)"


def test_memory_is_drawn_term_by_term_where_the_plan_kept_its_terms(
    reader: Reader, opened: Callable[[dict[str, Any]], Path]
) -> None:
    document = small_document([row("lora", trained(0.8)), row("full", trained(0.9))])
    reader.open(opened(document))
    assert "No run here recorded the peak of its tensors" in " ".join(reader.texts("#memory .caption"))
    document["cells"][0]["memory"] |= {
        "tensor_peak_bytes": 200 * MIB,
        "predicted_tensor_peak_bytes": 210 * MIB,
        "predicted_terms": {"weights": 150 * MIB, "activations": 60 * MIB},
    }
    # a second seed without activations: the mean of 60 and 0 MiB
    second = document["cells"][0] | {"seed": 1, "memory": dict(document["cells"][0]["memory"])}
    second["memory"] |= {"predicted_tensor_peak_bytes": 150 * MIB, "predicted_terms": {"weights": 150 * MIB}}
    reader.open(opened(document | {"cells": [*document["cells"], second]}))
    assert "180.0 MiB (−10.0 %)" in reader.texts("#memory svg .bar-value")
    reader.open(opened(document))
    labels = reader.run("return [...document.querySelectorAll('#memory .hit')].map((e) => e.ariaLabel)")
    assert {"lora, weights: 150.0 MiB", "lora, activations: 60.0 MiB"} <= set(labels)
    assert "210.0 MiB (+5.0 %)" in reader.texts("#memory svg .bar-value")


KINDS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], list[str], list[str]]] = {
    "tokens": (
        [{"row": 0, "loss": 2.0, "tokens": 4, "correct": 4}, {"row": 1, "loss": 9.0, "tokens": 3, "correct": 0}],
        [{"row": 0, "loss": 6.0, "tokens": 4, "correct": 1}, {"row": 1, "loss": 9.0, "tokens": 3, "correct": 0}],
        ["0", "1", "0", "1"],
        ["4 tokens", "✓ 4 right loss 0.500", "✗ 1 right loss 1.500", "only A right", "+1.000"],
    ),
    "number": (
        [{"row": 0, "label": 3.0, "prediction": 2.5, "scores": [2.5]}, {"row": 1, "label": 1.0, "prediction": 1.0}],
        [{"row": 0, "label": 3.0, "prediction": 1.0, "scores": [1.0]}, {"row": 1, "label": 1.0, "prediction": 1.0}],
        ["1", "1", "0"],
        ["3.000", "2.500 off by 0.500", "1.000 off by 2.000", "A nearer", "+1.500"],
    ),
    "labels": (
        [{"row": 0, "label": [1, 0, 1], "prediction": [1, 0, 1], "scores": [0.9, 0.1, 0.8], "loss": 0.5}],
        [{"row": 0, "label": [1, 0, 1], "prediction": [0, 1, 0], "scores": [0.4, 0.7, 0.2], "loss": 2.0}],
        ["0", "1", "0", "0"],
        ["label 0, label 2", "✓ label 0, label 2 loss 0.500", "✗ label 1 loss 2.000", "only A right", "+1.500"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_has_its_disagreements(
    reader: Reader, tmp_path: Path, opened: Callable[[dict[str, Any]], Path], kind: str
) -> None:
    rows = []
    for name, answers in zip(("first", "second"), KINDS[kind][:2], strict=True):
        write_json_lines(tmp_path / name / "predictions.jsonl", answers)
        rows.append(CellRow(name, 0, tmp_path / name, record(metrics=accuracy(0.9 - len(rows) / 9, n=2))))
    document = small_document(rows)
    assert document["example_sets"][0]["kind"] == kind
    reader.open(opened(document))
    counts, cells = KINDS[kind][2:]
    assert reader.texts("#disagreements .tile b") == counts
    assert reader.texts("#disagreements tbody tr:first-child td") == cells


def test_many_methods_are_coloured_by_what_varies(
    reader: Reader, tmp_path: Path, opened: Callable[[dict[str, Any]], Path]
) -> None:
    rows = make_cells(tmp_path, many_methods(20), seeds=1, examples=10, failures=False)
    reader.open(opened(small_document(rows)))
    assert reader.texts("#tradeoffs .chip > span:first-of-type") == [str(2**i) for i in range(1, 11)]
    reader.run(
        "const select = [...document.querySelectorAll('#tradeoffs select')].at(-1);"
        "select.value = 'training.learning_rate'; select.dispatchEvent(new Event('change'))"
    )
    assert reader.texts("#tradeoffs .chip > span:first-of-type") == ["0.0001", "0.0002"]


def test_a_run_alone_and_a_suite_without_a_score_still_make_a_page(
    reader: Reader, tmp_path: Path, opened: Callable[[dict[str, Any]], Path]
) -> None:
    write_json(tmp_path / "suite.yaml", {})
    reader.open(opened(page_document(tmp_path, "bare", [row("x", None)], [])))
    assert "No run has a score yet." in reader.texts("#headline .note")
    assert reader.texts("#setup code") == [f"peftkit bench {tmp_path}/suite.yaml --out {tmp_path}"]
    assert reader.messages() == []
    reader.open(opened(small_document([row("x", record(metrics=accuracy(0.8)))])))
    assert reader.texts("#tradeoffs .note")
    assert reader.messages() == []
