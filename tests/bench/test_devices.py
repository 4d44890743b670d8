"""Devices as a driver's tool lists them: one that stands on the path in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.bench.devices import require_idle, visible_devices
from peftkit.bench.local import Local
from peftkit.bench.process import Conditions
from peftkit.errors import DeviceBusy, InputError

IDLE = "0, GPU-aaaa, NVIDIA RTX 3060, 400, 12288"
BUSY = "1, GPU-bbbb, NVIDIA RTX 3060, 9000, 12288"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lays a `nvidia-smi` that knows these devices; one process holds memory on the second."""

    def lay(*devices: str) -> None:
        tool = tmp_path / "nvidia-smi"
        listed, held = "\\n".join(devices), "GPU-bbbb, 4242, python, 8600"
        tool.write_text(f'#!/bin/sh\ncase "$1" in --query-gpu*) printf "{listed}\\n";; *) echo "{held}";; esac\n')
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lay


def test_without_a_driver_there_is_no_device_and_nothing_is_busy(driver: Callable[..., None]) -> None:
    assert visible_devices() == []
    require_idle()


def test_devices_are_those_that_cuda_would_see_in_its_order(
    driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(IDLE, BUSY)
    assert [device.uuid for device in visible_devices()] == ["GPU-aaaa", "GPU-bbbb"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb,0")
    assert [device.index for device in visible_devices()] == ["1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,0")
    assert visible_devices() == []


def test_a_device_in_use_is_refused_with_who_holds_it(
    driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(IDLE, BUSY)
    require_idle()  # 400 of 12288 MiB are a desktop's
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(DeviceBusy, match=r"8\.8 GiB of 12\.0 GiB in use: process 4242 \(python\) 8600 MiB"):
        require_idle()


def test_cells_at_once_get_a_device_each_and_no_more_than_there_are(driver: Callable[..., None]) -> None:
    driver(IDLE, BUSY)
    with pytest.raises(DeviceBusy, match="device 1"):
        Local(jobs=2).check(Conditions())
    Local(jobs=2).check(Conditions(even_if_busy=True))
    with pytest.raises(InputError, match="--jobs=3 with 2 CUDA device"):
        Local(jobs=3).check(Conditions())
    with pytest.raises(InputError, match="--jobs=0 runs nothing"):
        Local(jobs=0).check(Conditions())
