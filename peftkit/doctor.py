"""What this machine can do for peftkit, and what stands in the way, each with its remedy."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftkit.cache import home
from peftkit.units import GIB, format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "evaluate", "safetensors"),
    *("tokenizers", "gguf", "numpy", "scikit-learn", "matplotlib", "pip", "tensorboard", "trackio", "wandb", "mlflow"),
)
OPTIONAL = ("tensorboard", "trackio", "wandb", "mlflow")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "PIP_NO_INDEX")
WANTED_DISK_BYTES = 5 * GIB
WANTED_MEMORY_BYTES = 4 * GIB
Level = Literal["error", "warning", "hint"]


@dataclass(frozen=True, slots=True)
class Device:
    """Something to train on. `bfloat16` is true where the device multiplies it natively."""

    name: str
    kind: Literal["cuda", "mps", "cpu"]
    total_bytes: int
    free_bytes: int
    bfloat16: bool


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One thing in the cache folder."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know: `error` stops runs, `warning` limits them, `hint` makes them better."""

    level: Level
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """The machine as peftkit sees it.

    Attributes:
        devices: in the order a run prefers them; the processor is the last.
        packages: installed versions; a package that is not installed is absent.
        offline: the variables that are set and forbid the network.
        quantization: whether bitsandbytes packs weights in NF4 and unpacks them here.
    """

    python: str
    system: str
    packages: dict[str, str]
    devices: tuple[Device, ...]
    cores: int
    threads: int
    cache_folder: str
    cache_free_bytes: int
    cache: tuple[CacheEntry, ...]
    offline: tuple[str, ...]
    quantization: bool
    findings: tuple[Finding, ...]


def examine(environment: Mapping[str, str] = os.environ) -> Report:
    """Look at this machine. Takes a few seconds: torch is loaded, and bitsandbytes is tried on a small tensor."""
    import torch

    folder = home()
    facts = Facts(
        packages=_versions(),
        devices=_devices(),
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        cache_free_bytes=_free_bytes(folder),
        cache_writable=_is_writable(folder),
        offline=tuple(
            name for name in OFFLINE_VARIABLES if environment.get(name, "0").lower() not in ("", "0", "false")
        ),
        quantization_fault=_quantization_fault(),
        wait_policy=environment.get("OMP_WAIT_POLICY", ""),
    )
    return Report(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=facts.packages,
        devices=facts.devices,
        cores=facts.cores,
        threads=facts.threads,
        cache_folder=str(folder),
        cache_free_bytes=facts.cache_free_bytes,
        cache=_cache_entries(folder),
        offline=facts.offline,
        quantization=facts.quantization_fault is None,
        findings=tuple(judge(facts)),
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """What the findings are drawn from."""

    packages: dict[str, str]
    devices: tuple[Device, ...]
    cores: int
    threads: int
    cache_free_bytes: int
    cache_writable: bool
    offline: tuple[str, ...]
    quantization_fault: str | None
    wait_policy: str


def judge(facts: Facts) -> list[Finding]:
    """The findings, gravest first."""
    found = []
    device = facts.devices[0]
    missing = [name for name in PACKAGES if name not in facts.packages and name not in OPTIONAL]
    if missing:
        found.append(Finding("error", f"not installed: {', '.join(missing)}", "pip install -c constraints.txt -e ."))
    if not facts.cache_writable:
        found.append(Finding("error", "the cache folder cannot be written", "set PEFTKIT_HOME to a folder that can"))
    if facts.cache_free_bytes < WANTED_DISK_BYTES:
        what = f"{format_bytes(facts.cache_free_bytes)} of disk free at the cache, and models want more"
        found.append(Finding("warning", what, "free space, or set PEFTKIT_HOME to a larger disk"))
    if device.free_bytes < WANTED_MEMORY_BYTES:
        what = f"{format_bytes(device.free_bytes)} of memory free on {device.name}"
        found.append(
            Finding("warning", what, "end what else uses it, or choose a smaller preset: peftkit recipes list")
        )
    if facts.quantization_fault is not None:
        what = f"4-bit backbones (qlora) do not work here: {facts.quantization_fault}"
        found.append(Finding("warning", what, "pip install -U bitsandbytes, or use method=lora"))
    if device.kind == "cuda" and not device.bfloat16:
        what = f"{device.name} has no bfloat16; backbones are held in float16"
        found.append(Finding("hint", what, "set backbone.dtype=float32 if the loss is not finite"))
    if facts.offline:
        what = f"{', '.join(facts.offline)} forbids the network: only what is cached or packaged can be used"
        found.append(Finding("hint", what, f"unset {' '.join(facts.offline)} to fetch hub models and packages"))
    if device.kind == "cpu" and facts.wait_policy.lower() != "passive":
        what = "idle threads spin, which slows whatever else runs on these cores"
        found.append(Finding("hint", what, "export OMP_WAIT_POLICY=passive when several runs share the machine"))
    if device.kind == "cpu" and facts.threads > facts.cores:
        what = f"torch uses {facts.threads} threads on {facts.cores} usable cores"
        found.append(Finding("warning", what, f"export OMP_NUM_THREADS={facts.cores}"))
    order = ("error", "warning", "hint")
    return sorted(found, key=lambda finding: order.index(finding.level))


def to_document(report: Report) -> dict[str, Any]:
    """The report as plain data for JSON."""
    return asdict(report)


def render(report: Report) -> RenderableType:
    """The report for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("Python", f"{report.python} on {report.system}")
    for device in report.devices:
        native = "bfloat16" if device.bfloat16 else "no native bfloat16"
        memory = f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
        table.add_row(device.kind.upper(), Text(f"{device.name}: {memory}, {native}"))
    table.add_row("Cores", f"{report.cores} usable, {report.threads} torch threads")
    table.add_row("4-bit (NF4)", "works" if report.quantization else "does not work")
    table.add_row("Cache", Text(f"{report.cache_folder}: {format_bytes(report.cache_free_bytes)} free on its disk"))
    for entry in report.cache:
        table.add_row("", Text(f"{format_bytes(entry.num_bytes):>10}  {entry.name}"))
    table.add_row("Network", f"forbidden by {', '.join(report.offline)}" if report.offline else "not forbidden")
    table.add_row("Packages", ", ".join(f"{name} {number}" for name, number in report.packages.items()))
    colours = {"error": "bold red", "warning": "yellow", "hint": "cyan"}
    lines = [
        Text.assemble((f"{finding.level}: ", colours[finding.level]), f"{finding.what}. Remedy: {finding.remedy}.")
        for finding in report.findings
    ]
    return Group(table, Text(""), *(lines or [Text("Nothing stands in the way.", style="green")]))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _devices() -> tuple[Device, ...]:
    """Accelerators first, the processor last; its memory is the machine's."""
    import psutil
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        devices.append(Device(torch.cuda.get_device_name(index), "cuda", total, free, native))
    memory = psutil.virtual_memory()
    if torch.backends.mps.is_available():
        devices.append(Device("Apple GPU", "mps", memory.total, memory.available, True))
    name = _processor_name()
    devices.append(Device(name, "cpu", memory.total, memory.available, torch.cpu._is_avx512_bf16_supported()))
    return tuple(devices)


def _processor_name() -> str:
    """The model name where Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    import psutil

    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS has no affinity
        return psutil.cpu_count() or 1


def _quantization_fault() -> str | None:
    """Why NF4 does not work on the preferred device; None when a packed tensor comes back close to what it was."""
    import torch

    try:
        from bitsandbytes import functional
    except (ImportError, OSError, RuntimeError) as fault:
        return _first_line(fault)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    try:
        packed, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
        back: Any = functional.dequantize_4bit(packed, state)
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as fault:
        return _first_line(fault)
    # NF4's widest gap on [-1, 1] is 0.30: rounding stays within half of it.
    worst = (back.float() - values).abs().max().item()
    return None if worst < 0.2 else f"unpacked weights are off by {worst:.2f}"


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _free_bytes(folder: Path) -> int:
    import psutil

    return int(psutil.disk_usage(str(_existing(folder))).free)


def _is_writable(folder: Path) -> bool:
    existing = _existing(folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _cache_entries(folder: Path) -> tuple[CacheEntry, ...]:
    """What lies in the cache, two levels down, by size; half-made folders and locks are left out."""
    entries = [
        CacheEntry(
            str(path.relative_to(folder)), sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        )
        for path in folder.glob("*/*")
        if path.is_dir() and not path.name.startswith(".")
    ]
    return tuple(sorted(entries, key=lambda entry: -entry.num_bytes))
