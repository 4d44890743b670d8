"""The recipe: every fault at once, overrides, aliases, digests, and YAML that means what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import InputError, RecipeError
from peftkit.recipe import Recipe, build_recipe, load_recipe, parse_yaml

BASE: dict[str, Any] = {
    "backbone": "minilm-l6",
    "method": "lora",
    "task": "classify",
    "data": {"train": "builtin:movie-sentiment", "validation": "builtin:movie-sentiment"},
}


def faults_of(*overrides: str, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        build_recipe({**BASE, **changes}, overrides)
    return caught.value.faults


def test_all_faults_are_told_at_once_each_with_the_nearest_key() -> None:
    faults = faults_of("training.learning_rat=1e-4", "method.rnk=8", "seed=x")
    assert len(faults) == 3
    assert any("training.learning_rat: unknown key; did you mean 'learning_rate'" in fault for fault in faults)
    assert any("method.rnk: unknown key; did you mean 'rank'" in fault for fault in faults)
    assert any(fault.startswith("seed:") for fault in faults)


def test_a_value_that_no_branch_takes_is_one_fault() -> None:
    (fault,) = faults_of("training.micro_batch=5 tok")
    assert fault.startswith("training.micro_batch:")
    assert "'auto'" in fault


def test_an_unknown_method_names_the_nearest_and_all() -> None:
    (fault,) = faults_of("method=lorra")
    assert "did you mean 'lora'" in fault
    assert "qlora" in fault


def test_a_missing_section_is_told() -> None:
    (fault,) = faults_of(data={})
    assert fault == "data.train: is required"


def test_a_number_that_is_no_number_is_refused() -> None:
    assert faults_of("training.learning_rate=.nan")
    assert faults_of("training.learning_rate=-1")


def test_qlora_is_lora_on_nf4() -> None:
    recipe = build_recipe(BASE, ["method=qlora"])
    assert (recipe.method.kind, recipe.backbone.quantization, recipe.label) == ("lora", "nf4", "qlora")
    assert build_recipe(BASE, ["method=qlora", "method.rank=4"]).method.model_dump()["rank"] == 4


def test_choosing_a_kind_forgets_the_fields_of_the_other() -> None:
    content = {**BASE, "method": {"kind": "lora", "rank": 8}}
    assert build_recipe(content, ["method=prompt"]).method.kind == "prompt"


def test_yaml_is_version_1_2() -> None:
    recipe = build_recipe(BASE, ["training.learning_rate=1e-4", "training.checkpointing=off"])
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.checkpointing == "off"
    assert parse_yaml("on", where="x") == "on"


def test_a_recipe_survives_its_own_yaml() -> None:
    for method in ("lora", "qlora", "full", "prefix", "prompt", "zero-shot", {"kind": "peft", "type": "VERA", "r": 4}):
        recipe = build_recipe({**BASE, "method": method})
        again = build_recipe(parse_yaml(recipe.to_yaml(), where="x"))
        assert again == recipe
        assert again.digest == recipe.digest


def test_the_digest_is_of_what_decides_the_run() -> None:
    recipe = build_recipe(BASE)
    assert build_recipe({**BASE, "description": "for people"}).digest == recipe.digest
    assert build_recipe(BASE, ["tracking.to=[tensorboard]"]).digest == recipe.digest
    assert build_recipe(BASE, ["training.learning_rate=2.0e-4"]).digest == recipe.digest  # the default, said aloud
    assert build_recipe(BASE, ["seed=1"]).digest != recipe.digest


def test_differing_keys_name_both_values() -> None:
    one, other = build_recipe(BASE), build_recipe(BASE, ["method.rank=4"])
    assert one.differing_keys(other) == ["method.rank: 16 -> 4"]


def test_settings_that_would_be_ignored_are_refused() -> None:
    assert "would be ignored" in faults_of("method=zero-shot", "training.learning_rate=1e-3")[0]
    assert "would be ignored" in faults_of("evaluation.patience=2", data={"train": "x.jsonl"})[0]
    padded = ("method=prefix", "training.checkpointing=all", "training.kernels.packing=false")
    assert "training.checkpointing=off" in faults_of(*padded)[0]
    assert "training.clip=null" in faults_of("training.optimizer_in_backward=true")[0]


def test_paths_beside_the_recipe_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "b"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text("backbone: minilm-l6\nmethod: lora\ntask: classify\ndata: {train: train.jsonl}\n")
    monkeypatch.chdir("/")
    assert load_recipe(path).data.train == str(tmp_path / "train.jsonl")


@pytest.mark.parametrize(
    ("text", "told"),
    [("a: [1\n", "line"), ("- a\n- b\n", "not a mapping"), ("a: 1\na: 2\n", "not valid YAML")],
)
def test_a_file_that_is_no_recipe_is_told(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        load_recipe(path)


def test_a_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match=r"did you mean 'recipe\.yaml'"):
        load_recipe(tmp_path / "recipes.yaml")


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(InputError, match=r"key\.sub=value"):
        build_recipe(BASE, ["training.epochs"])


def test_frozen(classify_recipe: Any) -> None:
    recipe: Recipe = classify_recipe()
    with pytest.raises(ValueError, match="frozen"):
        setattr(recipe, "se" + "ed", 3)
