"""CUDA devices as the driver sees them, without torch: which there are, and what others hold of their memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from peftkit.errors import DeviceBusy
from peftkit.units import MIB, format_bytes

LARGEST_SHARE = 0.1
"""Of a device's memory that may be in use before a cell starts: a desktop's windows, the driver's own."""
SECONDS_TO_ANSWER = 20


@dataclass(frozen=True, slots=True)
class Device:
    """One CUDA device. `uuid` is what CUDA_VISIBLE_DEVICES takes, whatever the order."""

    index: str
    uuid: str
    name: str
    used_bytes: int
    total_bytes: int


def visible_devices() -> list[Device]:
    """The devices that this process may use, in its order; none without NVIDIA's driver."""
    known = [
        Device(index, uuid, name, int(used) * MIB, int(total) * MIB)
        for index, uuid, name, used, total in _ask("--query-gpu=index,uuid,name,memory.used,memory.total")
        if used.isdigit() and total.isdigit()
    ]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return known
    found = []
    for word in filter(None, map(str.strip, chosen.split(","))):
        match = next((each for each in known if each.index == word or each.uuid.startswith(word)), None)
        if match is None:  # CUDA ignores what follows an unknown device
            break
        found.append(match)
    return found


def require_idle(*, first_only: bool = True) -> None:
    """Refuse to measure on a device whose memory is in use.

    Args:
        first_only: look at the device that a cell would take, not at all of them.

    Raises:
        DeviceBusy: with who holds how much, and what to do.
    """
    devices = visible_devices()
    for device in devices[:1] if first_only else devices:
        if device.used_bytes > LARGEST_SHARE * device.total_bytes:
            holders = ", ".join(
                f"process {pid} ({name}) {used} MiB"
                for uuid, pid, name, used in _ask("--query-compute-apps=gpu_uuid,pid,process_name,used_memory")
                if uuid == device.uuid
            )
            held = f"{format_bytes(device.used_bytes)} of {format_bytes(device.total_bytes)}"
            raise DeviceBusy(
                f"{device.name} (device {device.index}) has {held} in use{f': {holders}' if holders else ''}, which "
                "would falsify what is measured. Free it, choose another with CUDA_VISIBLE_DEVICES, or "
                "measure all the same with --even-if-busy."
            )


def _ask(query: str) -> list[list[str]]:
    """Rows of the driver's own tool; none where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_TO_ANSWER)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
