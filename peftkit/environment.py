"""Where a run happened: versions, commit, device and threads."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy")


def describe_environment() -> dict[str, Any]:
    """Package versions, the commit of this checkout if it is one, the device, its memory in bytes, and threads."""
    import psutil
    import torch

    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device": "cpu",
        "device_name": _processor(),
        "device_memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "omp_spins": os.environ.get("GOMP_SPINCOUNT", "unset"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        environment |= {
            "device": "cuda",
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "cuda": str(torch.version.cuda),
        }
    commit = _commit()
    return environment | ({"commit": commit} if commit else {})


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` when files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
