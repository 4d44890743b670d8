"""Frozen lower layers run once per example: their output is kept on disk, and training starts from there.

CACHE/activations/KEY/whole/{hidden.bin, index.json}

Shapes: B examples, T positions of the longest, N positions of a packed batch, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.cache import home
from peftkit.data.batching import Batch, collate, micro_batches
from peftkit.data.features import Features
from peftkit.errors import InputError
from peftkit.files import staged_folder, write_json
from peftkit.train.frozen_layers import CachePlan, Refusal, answering, bytes_of, examples_of, plan_cache, run_to
from peftkit.units import MIB, format_bytes

FORMAT = 1
"""Raised when the layout of the file changes."""
WINDOW = 256
"""Examples cut into forwards at a time, of like lengths because the split is sorted first."""
CONTENT, INDEX = "hidden.bin", "index.json"
ABOUT = "What a model's frozen layers put out, kept for training.activation_cache of peftkit. Safe to delete."

Say = Callable[[str], None]


def cache_activations(
    model: nn.Module,
    splits: Sequence[Sequence[Features]],
    *,
    pad_id: int,
    max_tokens: int,
    settings: Mapping[str, Any],
    say: Say,
) -> list[ActivationCache]:
    """The kept states of each split, the one to train on first: read from disk, or made by one pass over it.

    The model stays as it is and no random number is drawn. Call it where training would compute: under its autocast.

    Args:
        max_tokens: padded tokens of one forward of that pass.
        settings: what else changes how layers compute, such as the recipe's kernels.

    Raises:
        InputError: the cache would not be exact, or the cache folder has too little space or cannot be written.
    """
    plan = plan_cache(model, splits[0], pad_id=pad_id, settings=settings)
    if isinstance(plan, Refusal):
        raise InputError(f"training.activation_cache: {plan.reason} Otherwise set training.activation_cache=false.")
    return [open_cache(model, plan, split, pad_id=pad_id, max_tokens=max_tokens, say=say) for split in splits]


def replaying(cache: ActivationCache | None, batch: Batch) -> AbstractContextManager[None]:
    """A context in which the model's frozen layers answer from the cache for this batch; without a cache, nothing.

    Only the forward has to run inside: what the backward pass recomputes lies above the frozen layers.
    """
    return nullcontext() if cache is None else answering(cache.plan.frozen, cache.hidden(batch))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each example of a split lies in the file: end to end, the longest first, in units of positions."""

    ordered: tuple[Features, ...]
    places: Mapping[int, tuple[int, int]]
    num_positions: int

    @classmethod
    def of(cls, features: Sequence[Features]) -> _Layout:
        """The layout of a split, whatever the order of its examples."""
        ordered = tuple(sorted(features, key=lambda feature: (-len(feature), feature.row)))
        ends = list(accumulate(len(feature) for feature in ordered))
        places = {f.row: (end - len(f), len(f)) for f, end in zip(ordered, ends, strict=True)}
        assert len(places) == len(ordered), "a split has each row once"
        return cls(ordered, places, ends[-1])


class ActivationCache:
    """The kept states of one split; `replaying(cache, batch)` is how they are used.

    Attributes:
        plan: which layers they stand in for.
        path: the file.
        built: whether this process ran the frozen layers for them.
    """

    def __init__(self, plan: CachePlan, path: Path, layout: _Layout, *, built: bool) -> None:
        self.plan, self.path, self.built = plan, path, built
        self._places = layout.places
        # read, not mapped: mapped pages would count as memory that the run needs
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)

    def hidden(self, batch: Batch) -> Tensor:
        """The frozen layers' output in the batch's layout, on its device: [B, T, H], zero at padding, or [1, N, H].

        Raises:
            InputError: the file was cut while it was in use.
        """
        device = batch.input_ids.device
        shape = (*batch.input_ids.shape, self.plan.hidden)
        kept = torch.zeros(shape, dtype=self.plan.dtype, pin_memory=device.type == "cuda")
        lengths = [self._places[row][1] for row in batch.rows]
        width = self.plan.hidden * self.plan.dtype.itemsize
        for row, own in zip(batch.rows, examples_of(kept, batch, lengths), strict=True):
            self._file.seek(self._places[row][0] * width)
            if self._file.readinto(bytes_of(own)) != own.nbytes:
                raise InputError(f"{self.path} was cut while it was in use. Start again: it will be made anew.")
        return kept.to(device, non_blocking=True)


def open_cache(
    model: nn.Module, plan: CachePlan, features: Sequence[Features], *, pad_id: int, max_tokens: int, say: Say
) -> ActivationCache:
    """The kept states of one split, as `cache_activations` gives them.

    One process makes them while others that ask wait. What was cut short or damaged is made anew.
    """
    from filelock import FileLock

    layout = _Layout.of(features)
    num_bytes = layout.num_positions * plan.hidden * plan.dtype.itemsize
    folder = home() / "activations" / _key(plan, layout) / "whole"
    _make_folder(folder.parent)
    with FileLock(folder.parent / ".lock"):
        for cut_short in folder.parent.iterdir():  # only the lock's holder builds here
            if cut_short.is_dir() and cut_short != folder:
                shutil.rmtree(cut_short, ignore_errors=True)
        built = not _is_whole(folder, num_bytes)
        if built:
            _require_space(folder.parent, num_bytes)
            say(
                f"activation cache: {plan.index} of {len(plan.blocks)} layers run once for {len(features)} examples; "
                f"their output takes {format_bytes(num_bytes)} in {folder}"
            )
            with staged_folder(folder) as staging:
                _fill(staging, model, plan, layout, pad_id=pad_id, max_tokens=max_tokens)
        else:
            say(f"activation cache: {plan.index} of {len(plan.blocks)} layers are read from {folder}")
        return ActivationCache(plan, folder / CONTENT, layout, built=built)


def _fill(folder: Path, model: nn.Module, plan: CachePlan, layout: _Layout, *, pad_id: int, max_tokens: int) -> None:
    """Run every example through the frozen layers; write their output, and then the index that vouches for it."""
    device, training, checksum = next(model.parameters()).device, model.training, 0
    model.eval()
    try:
        with (folder / CONTENT).open("wb") as file:
            for start in range(0, len(layout.ordered), WINDOW):
                for group in micro_batches(layout.ordered[start : start + WINDOW], max_tokens=max_tokens):
                    batch = collate(group, pad_id).to(device)
                    with torch.no_grad():
                        output = run_to(model, plan.frozen[-1], batch).cpu()
                    for own in examples_of(output, batch, [len(feature) for feature in group]):
                        checksum = zlib.crc32(bytes_of(own), checksum)
                        file.write(bytes_of(own))
    finally:
        model.train(training)
    index = {"about": ABOUT, "layers": plan.index, "hidden": plan.hidden, "dtype": str(plan.dtype)}
    write_json(folder / INDEX, index | {"examples": len(layout.ordered), "crc32": checksum})


def _is_whole(folder: Path, num_bytes: int) -> bool:
    """Whether the folder holds the content that its index vouches for."""
    checksum = 0
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if (folder / CONTENT).stat().st_size != num_bytes:
            return False
        with (folder / CONTENT).open("rb") as file:
            while piece := file.read(4 * MIB):
                checksum = zlib.crc32(piece, checksum)
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("crc32") == checksum


def _key(plan: CachePlan, layout: _Layout) -> str:
    """The name of a split's cache: digest of what computes it, and of every example's tokens."""
    digest = hashlib.blake2b(f"{FORMAT} {plan.identity}".encode(), digest_size=16)
    for feature in layout.ordered:
        types = feature.token_type_ids
        digest.update(f"{len(feature)} {types is None};".encode())
        digest.update(feature.input_ids.tobytes() + (b"" if types is None else types.tobytes()))
    return digest.hexdigest()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InputError(
            f"training.activation_cache cannot write {folder}: {fault.strerror}. Set PEFTKIT_HOME to another folder."
        ) from fault


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"training.activation_cache needs {format_bytes(num_bytes)} in {folder}, and {format_bytes(free)} are "
            "free there. Set PEFTKIT_HOME to a folder on a larger disk, or training.activation_cache=false."
        )
