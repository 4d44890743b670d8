"""One browser for all tests of the page, and a way to open a document in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Reader, start_browser

from peftkit.report.page import render_page


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    found = start_browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.driver.quit()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(document: dict[str, Any]) -> Path:
        path = tmp_path / "report.html"
        path.write_text(render_page(document), encoding="utf-8")
        return path

    return write
