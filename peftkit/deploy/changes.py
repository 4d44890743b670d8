"""Which tensors of a model on disk differ from its base's: those that the adapter changes, and no others."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.cache import file_sha256
from peftkit.deploy.adapter import INSIDE, Source, saved_shapes, touched_modules
from peftkit.deploy.hollow import Hollow
from peftkit.deploy.shards import read_header
from peftkit.deploy.weights import NotByTensor, list_files
from peftkit.errors import BackboneError


@dataclass(frozen=True, slots=True)
class Changes:
    """The base's tensors that a model changed, and what is wrong about that, in words."""

    compared: int
    changed: int
    faults: tuple[str, ...]


def fingerprints(model: nn.Module, dtype: torch.dtype, codes: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """A digest of every parameter's value in `dtype`, by name; tied parameters under each of their names.

    Args:
        codes: what quantized layers stand for, by module path.
    """
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        dense = codes[path] if codes and path in codes and name.endswith(".weight") else parameter
        found[name] = fingerprint(dense, dtype)
    return found


def fingerprint(tensor: Tensor, dtype: torch.dtype) -> str:
    """A digest of a tensor's value in `dtype`."""
    content = tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def touched_names(source: Source, adapted: Any, names: Collection[str]) -> set[str]:
    """Which of the base's tensors the adapter changes: those of its modules, and those that it brings along."""
    brought = {name.removeprefix(INSIDE).replace(".base_layer.", ".") for name in saved_shapes(source)}
    modules = touched_modules(adapted)
    return {name for name in names if name in brought or any(name.startswith(f"{path}.") for path in modules)}


def compare_fingerprints(before: Mapping[str, str], after: Mapping[str, str], touched: Collection[str]) -> Changes:
    """What changed between a base and a model made of it.

    Args:
        touched: names of the tensors that may change.
    """
    changed = [name for name, digest in before.items() if after.get(name, digest) != digest]
    return told(before, changed, [name for name in before if name not in after], touched)


def compare_on_disk(base: Hollow, model: Hollow, touched: Collection[str]) -> Changes:
    """The same, one tensor at a time."""
    before = [name for name, tensor in base.state.items() if isinstance(tensor, nn.Parameter)]
    known = [name for name in before if base.stored_name(name) is not None]
    lost = [name for name in before if name not in model.state]
    changed = [
        name
        for name in known
        if name not in lost and fingerprint(base.read(name), model.dtype) != fingerprint(model.read(name), model.dtype)
    ]
    return told(known, changed, lost, touched)


def told(before: Collection[str], changed: list[str], lost: list[str], touched: Collection[str]) -> Changes:
    """What is wrong about these changes."""
    strange = [name for name in changed if name not in touched]
    faults = []
    if not changed:
        faults.append("no tensor differs from the base: the adapter was not folded")
    if strange:
        faults.append(f"{len(strange)} tensors changed that the adapter does not touch, such as {strange[0]}")
    if lost:
        faults.append(f"{len(lost)} tensors of the base are gone, such as {lost[0]}")
    return Changes(len(before), len(changed), tuple(faults))


def file_faults(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """What is wrong with a model's weights files as files: cut short, or not what was once written.

    Args:
        digests: SHA-256 of each file, from when it was written.
    """
    faults = []
    try:
        for path in list_files(folder):
            read_header(path)
    except BackboneError as fault:
        faults.append(str(fault))
    except NotByTensor:
        faults.append(f"{folder} holds no safetensors")
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is gone")
        elif file_sha256(path) != digest:
            faults.append(f"{name} is not the file that was written: its SHA-256 differs")
    return faults
