"""Safetensors files written tensor by tensor are those that the library reads, and damaged ones are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.cache import file_sha256
from peftkit.deploy.shards import ShardWriter, read_header
from peftkit.errors import BackboneError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    with ShardWriter(path, plan) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert writer.digest == file_sha256(path)


def test_what_the_library_writes_is_read_and_copied_byte_for_byte(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs.safetensors", {"format": "pt"})
    shard = read_header(tmp_path / "theirs.safetensors")
    assert all(torch.equal(shard.read(name), tensor) for name, tensor in TENSORS.items())
    plan = {f"model.{name}": (entry.dtype, entry.shape) for name, entry in shard.entries.items()}
    with ShardWriter(tmp_path / "ours.safetensors", plan) as writer:
        for name in shard.entries:
            writer.copy(f"model.{name}", shard, name)
    found = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(found[f"model.{name}"], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: content + b"x", lambda content: b"", lambda content: content[:40]],
    ids=["cut short", "too long", "empty", "cut in its header"],
)
def test_a_damaged_file_is_told_by_its_header_alone(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BackboneError, match="is damaged"):
        read_header(path)
