"""Safetensors files read and written tensor by tensor: neither side ever holds a file in memory.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, a JSON header that gives
each tensor's dtype, shape and place, and the tensors' bytes end to end.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import sys
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from peftkit.errors import BackboneError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
HUGE = 2**21
"""Bytes of a huge page: larger tensors are read into such, since a large matrix takes thousands of small ones."""
CHUNK = 2**24
"""Bytes copied at a time."""
PIECE = 2**20
"""Bytes that are hashed and then written while they are in a core's cache."""
WAITING = 2**26
"""Bytes of tensors that may wait for the disk; one larger than that waits alone."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file; `start` and `end` count from the file's first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file and what is in it, in the order of their places."""

    path: Path
    entries: Mapping[str, Entry]

    def read(self, key: str) -> Tensor:
        """A tensor, as it lies there."""
        entry = self.entries[key]
        content = _room(entry.end - entry.start)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            _fill(file, content.numpy().data, self.path)
        return content.view(entry.dtype).reshape(entry.shape)


def read_header(path: Path) -> Shard:
    """What a file says it holds, checked against its size.

    Raises:
        BackboneError: not a safetensors file, or one that is cut short or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, LONGEST_HEADER):
            raise _damaged(path, "its header is longer than the file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: Entry(
                    DTYPES[told["dtype"]], tuple(told["shape"]), *(8 + length + at for at in told["data_offsets"])
                )
                for name, told in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise _damaged(path, f"its header cannot be understood ({type(fault).__name__}: {fault})") from fault
    place = 8 + length
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    for name, entry in ordered.items():
        if entry.start != place or entry.end - entry.start != entry.numel * entry.dtype.itemsize:
            raise _damaged(path, f"{name} is not where the header says")
        place = entry.end
    if place != size:
        raise _damaged(path, f"its header tells of {place} bytes, and it has {size}")
    return Shard(path, ordered)


@dataclass(slots=True)
class ShardWriter:
    """A file written in the order of its plan; after the block, `digest` is the SHA-256 of what was meant to be there.

    A thread hashes and writes while the caller makes the next tensor: what was handed over may not be changed.

    Attributes:
        plan: dtype and shape of each tensor, in order.
    """

    path: Path
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    digest: str = ""
    _left: list[str] = field(default_factory=list)
    _file: FileIO | None = None
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    _scribe: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _waiting: deque[tuple[Future[None], int]] = field(default_factory=deque)

    def __enter__(self) -> ShardWriter:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name, (dtype, shape) in self.plan.items():
            end = place + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._left = list(self.plan)
        self._file = self.path.open("wb", buffering=0)
        self._put(memoryview(len(text).to_bytes(8, "little") + text))
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the plan."""
        self._expect(name, tensor.dtype, tuple(tensor.shape))
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._hand_over(lambda: self._put(content), len(content))

    def copy(self, name: str, shard: Shard, key: str) -> None:
        """The next tensor of the plan, byte for byte from another file."""
        entry = shard.entries[key]
        self._expect(name, entry.dtype, entry.shape)
        self._hand_over(lambda: self._copy(shard.path, entry), 0)

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                self._let_finish(down_to=0)
        finally:
            self._scribe.shutdown(cancel_futures=True)
            self._file.close()
        if kind is None:
            assert not self._left, f"{self._left} were planned and not written"
            self.digest = self._hash.hexdigest()

    def _hand_over(self, work: Callable[[], None], size: int) -> None:
        self._let_finish(down_to=WAITING - size)
        self._waiting.append((self._scribe.submit(work), size))

    def _let_finish(self, *, down_to: int) -> None:
        """Wait until no more bytes than that wait, or none at all; a fault of the thread is raised here."""
        while self._waiting and (down_to <= 0 or sum(size for _, size in self._waiting) > down_to):
            self._waiting.popleft()[0].result()

    def _copy(self, path: Path, entry: Entry) -> None:
        buffer = memoryview(bytearray(min(CHUNK, max(1, entry.end - entry.start))))
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            for start in range(entry.start, entry.end, CHUNK):
                part = buffer[: min(CHUNK, entry.end - start)]
                _fill(file, part, path)
                self._put(part)

    def _expect(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        assert self._left, f"{name} comes after the last tensor of the plan"
        assert (name, (dtype, shape)) == (self._left[0], self.plan[self._left[0]]), f"{name} was not to be next"
        del self._left[0]

    def _put(self, content: memoryview) -> None:
        assert self._file is not None
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            self._hash.update(piece)
            while piece:
                piece = piece[self._file.write(piece) :]


def _room(size: int) -> Tensor:
    """Bytes to be filled."""
    if sys.platform != "linux" or size < HUGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _fill(file: FileIO, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        got = file.readinto(buffer[done:])
        if not got:
            raise _damaged(path, "it ends before its last tensor")
        done += got


def _damaged(path: Path, reason: str) -> BackboneError:
    return BackboneError(f"{path} is damaged: {reason}. Fetch or save that file again.")
