"""The scatter and the document around it."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up import accuracy, record, row, trained
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation

from peftkit.files import write_text
from peftkit.report.document import write_report
from peftkit.report.plots import scatter
from peftkit.report.rows import CellRow

CROWDED = [
    *(("full", 0.876, 410, 5200.0), ("lora", 0.869, 162, 6900.0), ("dora", 0.868, 170, 5600.0)),
    *(("qlora", 0.866, 150, 4100.0), ("prefix", 0.836, 148, 8300.0), ("ia3", 0.829, 140, 7900.0)),
    *(("prompt", 0.799, 185, 6100.0), ("head", 0.751, 42, 21000.0)),
]


def crowded() -> list[CellRow]:
    return [row(n, trained(v, memory_mib=memory, tokens_per_second=speed)) for n, v, memory, speed in CROWDED]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, for looking into."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def labels(axes: Axes) -> list[Annotation]:
    return [text for text in axes.texts if isinstance(text, Annotation)]


def test_the_plot_is_a_png_wide_enough_to_read(tmp_path: Path) -> None:
    assert scatter(crowded(), tmp_path / "scatter.png", title="eight methods")
    height, width, _ = imread(tmp_path / "scatter.png").shape
    assert (width, height) == (1600, 720)
    assert [path.name for path in tmp_path.iterdir()] == ["scatter.png"]


def test_no_label_covers_another_or_leaves_its_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    scatter(crowded(), tmp_path / "scatter.png")
    for axes in drawn[0].axes:
        boxes = [label.get_window_extent() for label in labels(axes)]
        assert len(boxes) == len(CROWDED)
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        frame = axes.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_points_stand_at_memory_in_mib_and_at_tokens_a_second(tmp_path: Path, drawn: list[Figure]) -> None:
    scatter([row("a", trained(0.8, memory_mib=64, tokens_per_second=512.0))], tmp_path / "s.png")
    memory, speed = drawn[0].axes
    assert labels(memory)[0].xy == (64, 0.8)
    assert labels(speed)[0].xy == (512, 0.8)
    assert "MiB" in memory.get_xlabel()
    assert "tokens/s" in speed.get_xlabel()
    assert "accuracy" in memory.get_ylabel()


def test_an_axis_is_logarithmic_only_where_values_spread_more_than_tenfold(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [row("a", trained(0.8, memory_mib=10, tokens_per_second=1000.0))]
    rows.append(row("b", trained(0.9, memory_mib=101, tokens_per_second=9900.0)))
    scatter(rows, tmp_path / "s.png")
    assert [axes.get_xscale() for axes in drawn[0].axes] == ["log", "linear"]


def test_chance_is_a_line_when_near_and_a_note_when_far(tmp_path: Path, drawn: list[Figure]) -> None:
    near = [row("a", trained(0.55)), row("b", trained(0.6))]
    far = [row("a", trained(0.95)), row("b", trained(0.96))]
    scatter(near, tmp_path / "s.png")
    scatter(far, tmp_path / "s.png")
    texts = [[text.get_text() for text in figure.axes[0].texts] for figure in drawn]
    assert "chance 0.500" in texts[0]
    assert "below this axis: chance 0.500" in texts[1]


def test_a_variant_that_trains_nothing_is_a_line_and_a_failed_one_is_absent(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    rows = [
        row("a", trained(0.6)),
        row("ask", record(metrics=accuracy(0.58))),
        row("x", record(status="oom", error="full")),
    ]
    scatter(rows, tmp_path / "s.png")
    assert [label.get_text() for label in labels(drawn[0].axes[0])] == ["a"]
    assert "ask 0.580" in [text.get_text() for text in drawn[0].axes[0].texts]


def test_a_name_with_dollar_signs_is_not_mathematics(tmp_path: Path) -> None:
    assert scatter([row(r"a$\frac$", trained(0.6))], tmp_path / "s.png", title="$x_{")


def test_nothing_is_drawn_without_a_measured_run(tmp_path: Path) -> None:
    assert not scatter([row("x", record(status="oom", error="full")), row("y", None)], tmp_path / "s.png")
    assert not (tmp_path / "s.png").exists()


def test_the_report_holds_table_plot_notes_command_and_environment(tmp_path: Path) -> None:
    write_text(tmp_path / "suite.yaml", "name: s\n")
    path = write_report(tmp_path, "a <b> suite", crowded(), description="Rates were tuned on validation.")
    text = path.read_text()
    assert text.startswith("# a &lt;b&gt; suite\n\n| variant | accuracy |")
    assert "![Quality against training memory and against speed](scatter.png)" in text
    assert "Rates were tuned on validation." in text
    assert f"peftkit bench {tmp_path}/suite.yaml --out {tmp_path}\n" in text
    assert "| packages torch | 2.13 |" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "suite.yaml",
        "report.md",
        "report.html",
        "results.csv",
        "results.parquet",
        "scatter.png",
    }


def test_a_report_without_a_measured_run_has_no_plot_left_from_before(tmp_path: Path) -> None:
    write_report(tmp_path, "s", crowded())
    text = write_report(tmp_path, "s", [row("x", record(status="oom", error="full"))]).read_text()
    assert "scatter.png" not in text
    assert not (tmp_path / "scatter.png").exists()
