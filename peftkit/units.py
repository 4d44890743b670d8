"""Bytes, counts and seconds as people read them. Inside the program bytes are ints and times are seconds."""

from __future__ import annotations

import re

MIB = 2**20
GIB = 2**30
_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s?)?")


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `1.5 KiB`; binary units, one decimal from KiB up."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_count(count: float) -> str:
    """`338690` -> `339k`; three significant digits with k, M, B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit * (1 - 5e-4):  # what three digits round up to it is shown as it
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"


def parse_seconds(text: str) -> float:
    """`30m` -> 1800.0; `90`, `90s`, `1.5h`, `1h30m`.

    Raises:
        ValueError: neither a number of seconds nor hours, minutes and seconds in this order.
    """
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None or not any(found.groups()):
        raise ValueError(f"{text!r} is no length of time. Write 90s, 30m or 1h30m")
    return sum(float(part or 0) * size for part, size in zip(found.groups(), (3600, 60, 1), strict=True))


def format_seconds(seconds: float) -> str:
    """`75.3` -> `1m15s`; below ten seconds one decimal, below a tenth of one in milliseconds."""
    if 0 < seconds < 0.1:
        return f"{seconds * 1000:.2g}ms"
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_joules(joules: float) -> str:
    """`3600` -> `3.6 kJ`; from a tenth of a kilowatt-hour up in kWh."""
    if joules >= 3.6e5:
        return f"{joules / 3.6e6:.3g} kWh"
    return f"{joules / 1000:.3g} kJ" if joules >= 1000 else f"{joules:.3g} J"
