"""The published `config.json` of each hub model that a preset names, for planning where no hub is reachable."""

from __future__ import annotations

from pathlib import Path


def bundled_config(name: str) -> Path | None:
    """The configuration file kept for a hub id such as `Qwen/Qwen3-8B`; None for a model that no preset names."""
    path = Path(__file__).parent / f"{name.replace('/', '--')}.json"
    return path if path.is_file() else None


def bundled_names() -> list[str]:
    """The names whose configuration is kept, as a recipe writes them."""
    return sorted(path.stem.replace("--", "/") for path in Path(__file__).parent.glob("*.json"))
