"""The self-contained page of a benchmark: `report.html`, which opens from disk and asks no network for anything.

The template, style sheets and scripts of `page_assets` are joined into one file, with the numbers as a block of JSON. A
content security policy allows exactly that style and that script, by digest; the scripts write text, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.files import write_text
from peftkit.report.page_data import page_document
from peftkit.report.rows import CellRow

if TYPE_CHECKING:
    from peftkit.report.advice import Advice
    from peftkit.report.comparison import Difference

PAGE_NAME = "report.html"
TEMPLATE = "page.html"
STYLES = ("base.css", "parts.css", "media.css")
SCRIPTS = (
    "data.js",
    "format.js",
    "elements.js",
    "style.js",
    "chart.js",
    "panel.js",
    "advice.js",
    "outside.js",
    "headline.js",
    "tradeoffs.js",
    "differences.js",
    "curves.js",
    "memory.js",
    "columns.js",
    "runs.js",
    "readers.js",
    "examples.js",
    "details.js",
    "main.js",
)
"""In the order in which they are joined: later ones use the names of earlier ones."""


def write_page(
    out: Path,
    suite_name: str,
    rows: Sequence[CellRow],
    differences: Sequence[Difference],
    *,
    description: str = "",
    left_out: Mapping[str, str] | None = None,
    advice: Sequence[Advice] | None = None,
) -> Path:
    """Write `report.html` into `out`: every number, curve and prediction of the rows; its path.

    Args:
        differences: against one reference or several, of which the page shows the first until another is chosen.
        left_out: variants that could not be compared, and why.
        advice: what to take; None has it worked out.

    Raises:
        OutputError: `out` cannot be written.
    """
    document = page_document(
        out, suite_name, rows, differences, description=description, left_out=left_out, advice=advice
    )
    write_text(out / PAGE_NAME, render_page(document))
    return out / PAGE_NAME


def render_page(document: dict[str, Any]) -> str:
    """The page that shows a document of `page_document`."""
    style = _joined(STYLES)
    script = f'(() => {{\n"use strict";\n{_joined(SCRIPTS)}}})();\n'
    parts = {
        "TITLE": html.escape(document["suite"]),
        "POLICY": html.escape(_policy(style, script)),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _embedded(document),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset(TEMPLATE))


def _policy(style: str, script: str) -> str:
    """Nothing from anywhere but this style, this script and pictures written inside the page."""
    return (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(document: dict[str, Any]) -> str:
    """JSON that no string inside of it can end: `<`, `>` and `&` are written as escapes, and all else in ASCII."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _joined(names: Sequence[str]) -> str:
    return "".join(_asset(name) for name in names)


def _asset(name: str) -> str:
    return (files("peftkit.report") / "page_assets" / name).read_text(encoding="utf-8")
