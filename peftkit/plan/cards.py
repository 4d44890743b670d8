"""Accelerator cards by name: what their memory holds and how fast they are.

Rates are the vendor's data sheet figures at boost clock, dense (without sparsity). Products in fp16 and bf16 count
with fp32 accumulation, which training uses and GeForce cards run at half the advertised fp16 rate. A laptop's rates
are those of its highest boost clock; at a lower power limit it is slower. Memory is what recent Linux drivers report
as the total (`torch.cuda.get_device_properties`), with ECC on where it is on by default: up to 10 % below the
advertised size, and within about 2 % of what another driver version reports.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from peftkit.errors import InputError, nearest
from peftkit.units import GIB


@dataclass(frozen=True, slots=True)
class Card:
    """A device to plan for; what is not known is None.

    Attributes:
        memory_bytes: all of it, the CUDA context's part included.
        bandwidth_bytes_per_second: of the device's memory.
        half_tflops: 10^12 floating point operations a second in bf16 or, where that is not native, fp16 products.
        fp32_tflops: the same in fp32 outside the tensor cores.
        bfloat16: whether matrix products are native in it.
        advertised_gb: the gigabytes in the card's name or on its box.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_per_second: float | None = None
    half_tflops: float | None = None
    fp32_tflops: float | None = None
    bfloat16: bool | None = None
    advertised_gb: int | None = None
    kind: Literal["cuda", "cpu"] = "cuda"


Row = tuple[str, int, float, float, float, float]
"""Name, advertised GB, memory in GiB, bandwidth in GB/s, fp16 or bf16 TFLOP/s, fp32 TFLOP/s."""

BEFORE_BFLOAT16: tuple[Row, ...] = (
    # without tensor cores, fp16 products are computed in fp32
    ("GTX 1080 Ti", 11, 10.91, 484, 11.3, 11.3),
    ("RTX 2060", 6, 5.79, 336, 25.8, 6.45),
    ("RTX 2060", 12, 11.65, 336, 28.7, 7.18),
    ("RTX 2070", 8, 7.78, 448, 29.9, 7.46),
    ("RTX 2080", 8, 7.77, 448, 40.3, 10.07),
    ("RTX 2080 Ti", 11, 10.75, 616, 53.8, 13.45),
    ("T4", 16, 14.56, 320, 65, 8.1),
    ("V100", 16, 15.77, 900, 125, 15.7),
    ("V100", 32, 31.73, 900, 125, 15.7),
)
WITH_BFLOAT16: tuple[Row, ...] = (
    ("RTX 3050", 8, 7.66, 224, 18.2, 9.1),
    ("RTX 3060", 12, 11.65, 360, 25.5, 12.7),
    ("RTX 3060 Ti", 8, 7.66, 448, 32.4, 16.2),
    ("RTX 3070", 8, 7.66, 448, 40.6, 20.3),
    ("RTX 3070 Ti", 8, 7.66, 608, 43.5, 21.7),
    ("RTX 3080", 10, 9.65, 760, 59.5, 29.8),
    ("RTX 3080", 12, 11.65, 912, 61.3, 30.6),
    ("RTX 3080 Ti", 12, 11.65, 912, 68.2, 34.1),
    ("RTX 3090", 24, 23.57, 936, 71.2, 35.6),
    ("RTX 3090 Ti", 24, 23.57, 1008, 80, 40),
    ("RTX 3060 Laptop", 6, 5.68, 336, 26.2, 13.1),
    ("RTX 3070 Laptop", 8, 7.66, 448, 33.2, 16.6),
    ("RTX 3080 Laptop", 8, 7.66, 448, 42, 21),
    ("RTX 3080 Laptop", 16, 15.6, 448, 42, 21),
    ("RTX 4060", 8, 7.63, 272, 30.2, 15.1),
    ("RTX 4060 Ti", 8, 7.63, 288, 44.1, 22.1),
    ("RTX 4060 Ti", 16, 15.58, 288, 44.1, 22.1),
    ("RTX 4070", 12, 11.6, 504, 58.3, 29.1),
    ("RTX 4070 Super", 12, 11.6, 504, 71, 35.5),
    ("RTX 4070 Ti", 12, 11.6, 504, 80.2, 40.1),
    ("RTX 4070 Ti Super", 16, 15.56, 672, 88.2, 44.1),
    ("RTX 4080", 16, 15.57, 717, 97.5, 48.7),
    ("RTX 4080 Super", 16, 15.57, 736, 104.4, 52.2),
    ("RTX 4090", 24, 23.52, 1008, 165.2, 82.6),
    ("RTX 4050 Laptop", 6, 5.64, 192, 24.3, 12.1),
    ("RTX 4060 Laptop", 8, 7.63, 256, 29.1, 14.6),
    ("RTX 4070 Laptop", 8, 7.63, 256, 40.1, 20),
    ("RTX 4080 Laptop", 12, 11.6, 432, 67.7, 33.9),
    ("RTX 4090 Laptop", 16, 15.57, 576, 79.4, 39.7),
    ("RTX 5060", 8, 7.53, 448, 38.4, 19.2),
    ("RTX 5060 Ti", 8, 7.53, 448, 47.4, 23.7),
    ("RTX 5060 Ti", 16, 15.47, 448, 47.4, 23.7),
    ("RTX 5070", 12, 11.5, 672, 61.7, 30.9),
    ("RTX 5070 Ti", 16, 15.46, 896, 87.9, 43.9),
    ("RTX 5080", 16, 15.46, 960, 112.6, 56.3),
    ("RTX 5090", 32, 31.36, 1792, 209.5, 104.8),
    ("RTX A4000", 16, 15.7, 448, 76.7, 19.2),
    ("RTX A5000", 24, 23.55, 768, 111.1, 27.8),
    ("RTX A6000", 48, 47.41, 768, 154.8, 38.7),
    ("RTX 6000 Ada", 48, 47.4, 960, 364.2, 91.1),
    ("A10", 24, 21.99, 600, 125, 31.2),
    ("A10G", 24, 22.06, 600, 70, 35),
    ("A30", 24, 23.5, 933, 165, 10.3),
    ("A40", 48, 44.35, 696, 149.7, 37.4),
    ("L4", 24, 22.03, 300, 121, 30.3),
    ("L40", 48, 44.4, 864, 181, 90.5),
    ("L40S", 48, 44.4, 864, 362, 91.6),
    ("A100", 40, 39.38, 1555, 312, 19.5),
    ("A100", 80, 79.15, 2039, 312, 19.5),
    ("H100 PCIe", 80, 79.11, 2000, 756, 51),
    ("H100 SXM", 80, 79.1, 3350, 989, 67),
    ("H100 NVL", 94, 93, 3900, 835, 60),
    ("H200", 141, 139.8, 4800, 989, 67),
    ("B200", 180, 178.35, 8000, 2250, 75),
)


def _cards() -> tuple[Card, ...]:
    """The rows as cards; names that several sizes share get theirs."""
    rows = [(row, False) for row in BEFORE_BFLOAT16] + [(row, True) for row in WITH_BFLOAT16]
    sizes = Counter(row[0] for row, _ in rows)
    return tuple(
        Card(
            name=f"{name} {gb}GB" if sizes[name] > 1 else name,
            memory_bytes=round(gib * GIB),
            bandwidth_bytes_per_second=bandwidth * 1e9,
            half_tflops=half,
            fp32_tflops=fp32,
            bfloat16=bfloat16,
            advertised_gb=gb,
        )
        for (name, gb, gib, bandwidth, half, fp32), bfloat16 in rows
    )


CARDS = _cards()

NOISE = re.compile(r"nvidia|geforce|tesla|quadro|rtx|gtx|gpu|generation|graphics|card|hbm2e?|[^a-z0-9]")
FORM = re.compile(r"pcie|sxm\d?|nvl")
SIZE = re.compile(r"(?<!\d)(\d{1,3})\s*gi?b\b|[\s_-](\d{1,3})$")
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([mgt]i?b)")
UNITS = {"mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SIZE_TOLERANCE = 0.1
"""ECC and driver versions change what is reported by less; the next smaller or larger card is further off."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A name taken apart: the chip, how it is mounted and its gigabytes, the latter two where they were said."""

    chip: str
    form: str | None
    gb: int | None


def _take_apart(name: str) -> _Wanted:
    """`NVIDIA A100-SXM4-80GB` -> a100, sxm, 80; `rtx4060ti 16gb` -> 4060ti, None, 16."""
    text = re.sub(r"hbm3e?", "sxm", name.strip().lower())  # what the driver calls the H100 SXM
    found = SIZE.search(text)
    rest = text if found is None else text[: found.start()] + " " + text[found.end() :]
    squeezed = NOISE.sub("", rest)
    form = FORM.search(squeezed)
    gb = None if found is None else int(found[1] or found[2])
    return _Wanted(FORM.sub("", squeezed), None if form is None else form[0][:3], gb)


def _matches(name: str) -> list[Card]:
    """The cards with this chip and, where both say it, this mounting."""
    wanted = _take_apart(name)
    own = [(card, _take_apart(card.name)) for card in CARDS]
    return [card for card, has in own if has.chip == wanted.chip and (not has.form or wanted.form in (None, has.form))]


def find_card(name: str) -> Card:
    """The card called so; spelling is loose: `rtx3060`, `4090`, `a100-80gb`, `NVIDIA H100 80GB HBM3`.

    Raises:
        InputError: no card, or more than one, is called so.
    """
    matches = _matches(name)
    if not matches:
        close = nearest(name.strip().lower(), [card.name.lower() for card in CARDS])
        remedy = "name one as in 'RTX 3060', or give its memory with a unit, as in 24GiB"
        raise InputError(f"no card is known as {name!r}: {remedy}{close}")
    gb = _take_apart(name).gb
    fitting = [card for card in matches if gb in (None, card.advertised_gb)]
    if len(fitting) == 1:
        return fitting[0]
    variants = ", ".join(f"{card.name!r} ({card.advertised_gb} GB)" for card in fitting or matches)
    if fitting:
        raise InputError(f"{name!r} can be {variants}: say which")
    raise InputError(f"{name!r} does not come with {gb} GB: known are {variants}. Memory alone will do: {gb}GiB")


def parse_gpu(text: str) -> Card:
    """The card that a name or a memory size stands for: `RTX 3060`, `12GiB`, `24GB` (24 x 10^9 bytes), `24576MiB`.

    Raises:
        InputError: neither a known card nor a size above 0.
    """
    found = MEMORY.fullmatch(text.strip().lower())
    if found is None:
        return find_card(text)
    memory_bytes = int(float(found[1]) * UNITS[found[2]])
    if memory_bytes == 0:
        raise InputError(f"a card of {text.strip()} holds nothing: give its memory, as in 24GiB")
    return Card(text.strip(), memory_bytes)


def this_machine() -> Card:
    """The first CUDA device under the driver's name, with the table's rates if it is there; else the host's memory."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return Card("this machine", int(psutil.virtual_memory().total), kind="cpu")
    properties = torch.cuda.get_device_properties(0)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return _as_reported(properties.name, int(properties.total_memory), native)


def _as_reported(name: str, memory_bytes: int, bfloat16: bool) -> Card:
    """A driver's device: the table's rates only if one card of that name has about this memory."""
    near = [card for card in _matches(name) if abs(memory_bytes / card.memory_bytes - 1) < SIZE_TOLERANCE]
    known = near[0] if len(near) == 1 else Card(name, memory_bytes)
    return replace(known, name=name, memory_bytes=memory_bytes, bfloat16=bfloat16)
