"""Presets are found, shown and copied."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peftkit import presets
from peftkit.errors import InputError, OutputError
from peftkit.recipe import load_recipe


def test_presets_are_listed_by_name_with_what_they_are_for() -> None:
    listed = presets.list_presets()
    assert [preset.name for preset in listed] == sorted(path.stem for path in presets.presets_folder().glob("*.yaml"))
    by_name = {preset.name: preset for preset in listed}
    assert by_name["chat-lora"].description == "Chat finetuning of SmolLM2-135M with LoRA"


def test_a_preset_is_shown_with_its_comments() -> None:
    assert presets.show("chat-lora.yaml") == presets.find("chat-lora").read_text(encoding="utf-8")
    assert presets.show("chat-lora").startswith("# yaml-language-server:")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'chat-qlora'"):
        presets.show("chat-qlroa")


def test_a_copy_is_the_same_recipe_and_is_never_overwritten(tmp_path: Path) -> None:
    path = presets.copy("classify-prompt", tmp_path / "mine")
    assert path == tmp_path / "mine" / "classify-prompt.yaml"
    assert load_recipe(path).digest == load_recipe(presets.find("classify-prompt")).digest
    assert (path.parent / "schema.json").is_file(), "the editor line of the copy points to it"
    path.write_text("mine")
    with pytest.raises(OutputError, match="not overwritten"):
        presets.copy("classify-prompt", path.parent)
    assert path.read_text() == "mine"


def test_an_installed_package_finds_the_presets_inside_itself(tmp_path: Path) -> None:
    package = Path(presets.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, tmp_path / "peftkit", ignore=ignored)
    shutil.copytree(presets.presets_folder(), tmp_path / "peftkit" / "recipes", ignore=ignored)
    code = "from peftkit import presets; print(presets.presets_folder()); print(len(presets.list_presets()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / "peftkit" / "recipes"), str(len(presets.list_presets()))]
