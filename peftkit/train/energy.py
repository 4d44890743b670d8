"""Joules from the hardware's own counters, where this process may read them.

On CUDA the card's counter, through NVML; on the processor those of its packages, through RAPL, which count whatever
else runs on them as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
MICRO, MILLI = 1e-6, 1e-3


class EnergyCounter(Protocol):
    """Joules since it was opened."""

    source: Literal["nvml", "rapl"]

    def joules(self) -> float: ...


def open_counter(device: torch.device, powercap: Path = POWERCAP) -> EnergyCounter | None:
    """The counter of a device; None where there is none that can be read."""
    return NvmlCounter.open(device) if device.type == "cuda" else RaplCounter.open(powercap)


@dataclass(slots=True)
class RaplZone:
    """One package's counter in microjoules, which starts again at 0 after `largest`."""

    path: Path
    largest: int
    last: int

    def advance(self) -> int:
        """Microjoules since the last look; a counter that went round more than once meanwhile tells too little."""
        before, self.last = self.last, int(self.path.read_text())
        return self.last - before + (self.largest + 1 if self.last < before else 0)


@dataclass(slots=True)
class RaplCounter:
    """The sum of the processor packages' counters."""

    zones: Sequence[RaplZone]
    source: Literal["nvml", "rapl"] = field(default="rapl", init=False)
    total: int = 0

    @classmethod
    def open(cls, powercap: Path) -> RaplCounter | None:
        """The packages below a powercap folder; None unless all can be read. Their parts would be counted twice."""
        zones = []
        try:
            for folder in sorted(powercap.glob("intel-rapl:*")):
                if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                    counter = folder / "energy_uj"
                    largest = int((folder / "max_energy_range_uj").read_text())
                    zones.append(RaplZone(counter, largest, int(counter.read_text())))
        except (OSError, ValueError):
            return None
        return cls(zones) if zones else None

    def joules(self) -> float:
        self.total += sum(zone.advance() for zone in self.zones)
        return self.total * MICRO


@dataclass(slots=True)
class NvmlCounter:
    """A card's counter, in steps of a millijoule, kept by the driver since it was loaded."""

    handle: object
    first: int
    source: Literal["nvml", "rapl"] = field(default="nvml", init=False)

    @classmethod
    def open(cls, device: torch.device) -> NvmlCounter | None:
        """The counter of a CUDA device; None without the package `nvidia-ml-py`, or on a card that has none."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            return cls(handle, pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except pynvml.NVMLError:
            return None

    def joules(self) -> float:
        import pynvml

        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self.first) * MILLI
