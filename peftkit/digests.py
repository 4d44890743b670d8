"""What a run came from besides its recipe, as two digests: what it reads, and the code that runs it.

A finished run stands for its recipe only as long as both are the same. Cheap: data files are read once a process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from peftkit.cache import file_sha256
from peftkit.data.builtin import BUILTINS, PREPARATION_VERSION
from peftkit.data.load import BUILTIN_PREFIX, source_files
from peftkit.data.spec import Split
from peftkit.environment import PACKAGES
from peftkit.errors import DataError
from peftkit.recipe import Recipe
from peftkit.record import Digests

DECIDING = (
    *("backbones", "data", "kernels", "methods", "plan", "stats", "tasks", "train"),
    *("prepare.py", "recipe.py", "run.py"),
)
"""Our sources that decide what a run measures: the command line, reports and deployment do not."""
SAMPLES, SAMPLE_BYTES = 16, 2**16
"""Of a local backbone's weights, which are too many to read, so many pieces of so many bytes."""


def digests_of(recipe: Recipe) -> Digests:
    """The digests of a run of the recipe as things are now; a source that is missing has a digest too."""
    return Digests(data=_data_digest(recipe), code=code_digest())


@cache
def code_digest() -> str:
    """Sixteen hexadecimal digits over peftkit's deciding sources and the versions of the libraries under them."""
    package = Path(__file__).parent
    files = [file for name in DECIDING for file in (package / name, *(package / name).rglob("*")) if file.is_file()]
    sources = {
        file.relative_to(package).as_posix(): file_sha256(file) for file in files if file.suffix in (".py", ".json")
    }
    return _digest([sorted(sources.items()), {name: metadata.version(name) for name in (*PACKAGES, "tokenizers")}])


def _data_digest(recipe: Recipe) -> str:
    data = recipe.data
    sources: dict[Split, Any] = {"train": data.train, "validation": data.validation, "test": data.test}
    read = {split: _source(source, split) for split, source in sources.items() if isinstance(source, str)}
    return _digest([read, _backbone(Path(recipe.backbone.name).expanduser())])


def _source(source: str, split: Split) -> Any:
    """What tells two states of a source apart: its files' contents; a packaged one's version; of a hub's, its name."""
    if source.startswith(BUILTIN_PREFIX):
        known = BUILTINS.get(source.removeprefix(BUILTIN_PREFIX))
        return None if known is None else [PREPARATION_VERSION, known.package.sha256]
    try:
        files = source_files(source, split)
    except DataError:
        return None
    return source if files is None else [_content(file) for file in files]


def _backbone(path: Path) -> Any:
    """A local backbone's files by name, size and pieces of their content; None for one that is not local."""
    if not path.exists():
        return None
    files: Iterable[Path] = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.name, file.stat().st_size, _pieces(file)) for file in files]


def _content(file: Path) -> str:
    status = file.stat()
    return _read(str(file.absolute()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _read(path: str, num_bytes: int, changed: int) -> str:
    """A file's digest, read again when its size or time of change differ."""
    return file_sha256(Path(path))


def _pieces(file: Path) -> str:
    """A digest of evenly spaced pieces; of a small file, of all of it."""
    num_bytes = file.stat().st_size
    if num_bytes <= SAMPLES * SAMPLE_BYTES:
        return _content(file)
    found = hashlib.sha256()
    with file.open("rb") as opened:
        for index in range(SAMPLES):
            opened.seek(index * (num_bytes - SAMPLE_BYTES) // (SAMPLES - 1))
            found.update(opened.read(SAMPLE_BYTES))
    return found.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
