"""The doctor sees this machine, and each thing that stands in the way comes with its remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from peftkit import doctor
from peftkit.doctor import Device, Facts, Finding, examine, judge, render
from peftkit.units import GIB

CPU = Device("a processor", "cpu", 16 * GIB, 12 * GIB, True)
SOUND = Facts(
    packages=dict.fromkeys(doctor.PACKAGES, "1.0"),
    devices=(CPU,),
    cores=4,
    threads=4,
    cache_free_bytes=100 * GIB,
    cache_writable=True,
    offline=(),
    quantization_fault=None,
    wait_policy="passive",
)


def test_the_report_describes_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_HOME", str(tmp_path))
    model = tmp_path / "backbones" / "some-model"
    model.mkdir(parents=True)
    (model / "weights").write_bytes(b"x" * 1000)
    report = examine({"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "0", "OMP_WAIT_POLICY": "passive"})
    assert report.devices[-1].kind == "cpu"
    assert report.devices[-1].total_bytes == psutil.virtual_memory().total
    assert report.cache_folder == str(tmp_path)
    assert [(entry.name, entry.num_bytes) for entry in report.cache] == [("backbones/some-model", 1000)]
    assert report.offline == ("HF_HUB_OFFLINE",)
    assert report.packages["peft"].startswith("0.21")
    assert json.loads(json.dumps(doctor.to_document(report)))["cores"] == report.cores

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(render(report))
        text = console.export_text()
    assert "some-model" in text
    assert "unset HF_HUB_OFFLINE" in text


def test_a_sound_machine_has_no_findings() -> None:
    assert judge(SOUND) == []


@pytest.mark.parametrize(
    ("change", "level", "remedy"),
    [
        ({"packages": {k: "1" for k in doctor.PACKAGES if k != "peft"}}, "error", "pip install"),
        ({"cache_writable": False}, "error", "PEFTKIT_HOME"),
        ({"cache_free_bytes": GIB}, "warning", "PEFTKIT_HOME"),
        ({"devices": (dataclasses.replace(CPU, free_bytes=GIB),)}, "warning", "smaller preset"),
        ({"quantization_fault": "no kernel"}, "warning", "method=lora"),
        ({"devices": (Device("T4", "cuda", 16 * GIB, 15 * GIB, False), CPU)}, "hint", "backbone.dtype=float32"),
        ({"offline": ("HF_HUB_OFFLINE",)}, "hint", "unset HF_HUB_OFFLINE"),
        ({"wait_policy": ""}, "hint", "OMP_WAIT_POLICY=passive"),
        ({"threads": 64}, "warning", "OMP_NUM_THREADS=4"),
    ],
)
def test_each_fault_is_found_with_its_remedy(change: dict[str, object], level: str, remedy: str) -> None:
    (finding,) = judge(dataclasses.replace(SOUND, **change))
    assert finding.level == level
    assert remedy in finding.remedy


def test_absent_optional_packages_are_no_finding() -> None:
    packages = {name: "1" for name in doctor.PACKAGES if name not in doctor.OPTIONAL}
    assert judge(dataclasses.replace(SOUND, packages=packages)) == []


def test_the_gravest_finding_comes_first() -> None:
    found: list[Finding] = judge(dataclasses.replace(SOUND, wait_policy="", threads=64, cache_writable=False))
    assert [finding.level for finding in found] == ["error", "warning", "hint"]


def test_nf4_that_returns_wrong_weights_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    assert doctor._quantization_fault() is None
    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: 2 * right(packed, state))
    assert "off by" in str(doctor._quantization_fault())
