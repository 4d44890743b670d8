"""Safetensors files written tensor by tensor are those that the library reads, and damaged ones are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.cache import file_sha256
from peftkit.deploy import shards
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


def test_tensors_that_wait_for_the_disk_come_in_order_and_their_faults_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PIECE", 1000)
    monkeypatch.setattr(shards, "WAITING", 2**16)
    tensors = {
        str(index): torch.randn(index * 1000, generator=torch.Generator().manual_seed(index)) for index in range(40)
    }
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(tmp_path / "model.safetensors", plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert writer.digest == file_sha256(tmp_path / "model.safetensors")
    shard = read_header(tmp_path / "model.safetensors")
    shard.path.write_bytes(shard.path.read_bytes()[:-8])
    with (
        pytest.raises(BackboneError, match="ends before its last tensor"),
        ShardWriter(tmp_path / "other.safetensors", {"39": plan["39"]}) as other,
    ):
        other.copy("39", shard, "39")


@pytest.mark.parametrize("size", [0, 5, shards.HUGE + 6])
def test_a_tensor_is_read_as_it_lies_whatever_its_size(size: int, tmp_path: Path) -> None:
    tensor = torch.arange(size, dtype=torch.int32).to(torch.int16)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    found = read_header(tmp_path / "model.safetensors").read("a")
    assert torch.equal(found, tensor)
    assert torch.equal(found.add_(1), tensor + 1)


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
