"""Joules from a made-up powercap tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftkit.train.energy import open_counter
from peftkit.train.meter import Meter

CPU = torch.device("cpu")
LARGEST = 999_999


def zone(powercap: Path, name: str, called: str, microjoules: int) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{called}\n")
    (folder / "max_energy_range_uj").write_text(f"{LARGEST}\n")
    counter = folder / "energy_uj"
    counter.write_text(f"{microjoules}\n")
    return counter


def test_packages_are_summed_their_parts_are_not_and_a_counter_goes_round(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 10)
    part = zone(tmp_path, "intel-rapl:0:0", "dram", 0)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 0)
    counter = open_counter(CPU, tmp_path)
    assert counter is not None
    assert counter.joules() == 0
    first.write_text("100000")  # 99,999 up to the largest, one to zero, 100,000 from there
    second.write_text("50010")
    for other in (part, whole):
        other.write_text("777777")
    assert counter.joules() == pytest.approx(0.200_000 + 0.050_000)
    second.write_text("60010")
    assert counter.joules() == pytest.approx(0.260_000)


def test_without_counters_or_the_right_to_read_them_there_is_none(tmp_path: Path) -> None:
    assert open_counter(CPU, tmp_path / "nothing") is None
    zone(tmp_path, "intel-rapl:0", "package-0", 0).unlink()
    assert open_counter(CPU, tmp_path) is None
    assert Meter(CPU).energy() is None


def test_a_run_counts_its_steps_and_not_what_lies_between_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = Meter(CPU, open_counter(CPU, tmp_path))
    for inside, outside in ((100_000, 300_000), (350_000, 999_000)):
        with meter.step():
            counter.write_text(str(inside))
        counter.write_text(str(outside))
    found = meter.energy()
    assert found is not None
    assert (found.joules, found.source) == (pytest.approx(0.15), "rapl")
    assert found.seconds == meter.train_seconds
    resumed = Meter(CPU, open_counter(CPU, tmp_path))
    resumed.restore(meter.state())
    with resumed.step():
        counter.write_text("999500")
    again = resumed.energy()
    assert again is not None
    assert again.joules == pytest.approx(0.1505)
