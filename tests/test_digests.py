"""What a run came from: when its digests change and when they don't."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from peftkit import digests
from peftkit.digests import code_digest, digests_of
from peftkit.recipe import Recipe, build_recipe


def recipe(data: Path | str, backbone: str = "minilm-l6", **training: Any) -> Recipe:
    content = {"backbone": backbone, "method": "lora", "task": "classify", "data": {"train": str(data)}}
    return build_recipe(content | {"training": training})


def test_data_are_told_apart_by_content_not_by_place_or_time(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "train.jsonl", tmp_path / "b" / "train.jsonl"
    for path in (one, other):
        path.parent.mkdir()
        path.write_text('{"text": "good", "label": "good"}\n')
    before = digests_of(recipe(one))
    assert digests_of(recipe(other)) == before
    assert digests_of(recipe(one, epochs=7)) == before, "the recipe has a digest of its own"
    one.write_text('{"text": "gold", "label": "good"}\n')  # as long as before
    assert digests_of(recipe(one)).data != before.data
    assert digests_of(recipe(one)).code == before.code


def test_a_missing_file_and_a_packaged_set_have_digests_too(tmp_path: Path) -> None:
    path = tmp_path / "late.jsonl"
    before = digests_of(recipe(path)).data
    path.write_text('{"text": "good", "label": "good"}\n')
    found = {before, digests_of(recipe(path)).data, digests_of(recipe("builtin:movie-sentiment")).data}
    assert len(found) == 3


def test_another_local_backbone_under_the_same_name_is_other_data(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    size = digests.SAMPLES * digests.SAMPLE_BYTES * 3
    weights.write_bytes(bytes(size))
    before = digests_of(recipe("builtin:movie-sentiment", str(weights.parent))).data
    for place in (0, size - 1):  # pieces of a large file are read, its ends among them
        content = bytearray(size)
        content[place] = 1
        weights.write_bytes(content)
        assert digests_of(recipe("builtin:movie-sentiment", str(weights.parent))).data != before


def test_code_is_what_decides_a_run_and_the_libraries_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(digests.__file__).parent
    copy = tmp_path / "peftkit"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(digests, "__file__", str(copy / "digests.py"))
    fresh = code_digest.__wrapped__
    before = fresh()
    (copy / "report" / "tables.py").write_text("other columns")
    (copy / "cli.py").write_text("other flags")
    assert fresh() == before
    (copy / "train" / "optimizers.py").write_text("another update")
    changed = fresh()
    assert changed != before
    versions = digests.metadata.version
    monkeypatch.setattr(digests.metadata, "version", lambda name: "9.9" if name == "torch" else versions(name))
    assert fresh() != changed
