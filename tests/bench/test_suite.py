"""What a suite expands to, and how its faults are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.bench.suite import Suite, build_suite, load_suite
from peftkit.errors import InputError, RecipeError
from peftkit.recipe import dump_yaml

BASE = {
    "backbone": "minilm-l6",
    "task": "classify",
    "data": {"train": "builtin:movie-sentiment"},
    "training": {"learning_rate": 0.001, "max_tokens": 64},
}


def suite(**content: Any) -> Suite:
    return build_suite({"name": "s", "recipe": {**BASE, "method": "lora"}, **content})


def faults_of(act: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        act()
    return caught.value.faults


def test_a_suite_has_a_cell_for_each_variant_grid_point_and_seed() -> None:
    cells = suite(
        variants={"small": {"method.rank": 4}, "large": {"method.rank": 64}},
        grid={"training.learning_rate": [0.001, 0.01]},
        seeds=[0, 1, 2],
    ).cells()
    found = [
        (c.variant, c.recipe.method.model_dump()["rank"], c.recipe.training.learning_rate, c.recipe.seed) for c in cells
    ]
    assert found == [
        (f"{name}, learning_rate={rate:g}", rank, rate, seed)
        for name, rank in (("small", 4), ("large", 64))
        for rate in (0.001, 0.01)
        for seed in (0, 1, 2)
    ]


def test_a_bare_word_chooses_the_kind_and_an_alias_both_its_axes() -> None:
    cells = suite(
        variants={
            "full": {"method": "full"},
            "lora": {"method.rank": 8, "method": "lora"},
            "qlora": {"method": "qlora"},
            "as it is": None,
        }
    ).cells()
    assert [(c.variant, c.recipe.label, c.recipe.backbone.quantization) for c in cells] == [
        ("full", "full", "none"),
        ("lora", "lora", "none"),
        ("qlora", "qlora", "nf4"),
        ("as it is", "lora", "none"),
    ]
    assert cells[1].recipe.method.model_dump()["rank"] == 8  # set inside the section that `method: lora` replaced


def test_a_suite_without_variants_names_its_cells_after_the_grid_or_the_method() -> None:
    assert [cell.variant for cell in suite().cells()] == ["lora"]
    gridded = suite(grid={"method": ["lora", "prompt"], "training.max_steps": [5]}).cells()
    assert [cell.variant for cell in gridded] == ["lora, max_steps=5", "prompt, max_steps=5"]


def test_shared_training_settings_do_not_reach_a_method_that_trains_nothing() -> None:
    tested = suite(variants={"ask": {"method": "zero-shot"}, "lora": {}}, always={"training.epochs": 1})
    ask, lora = (cell.recipe.training for cell in tested.cells())
    assert (ask.model_fields_set, ask.max_tokens) == ({"max_tokens"}, 64)
    assert (lora.learning_rate, lora.epochs, lora.max_tokens) == (0.001, 1, 64)


def test_a_training_setting_of_a_variant_that_trains_nothing_is_refused() -> None:
    (fault,) = faults_of(suite(variants={"ask": {"method": "zero-shot", "training.epochs": 7}}).cells)
    assert "training.epochs" in fault
    assert "trains nothing" in fault


def test_the_reports_reference_is_one_of_the_variants_and_no_part_of_a_cell() -> None:
    variants = {"lora": {}, "full": {"method": "full"}}
    plain, named = suite(variants=variants), suite(variants=variants, reference="full")
    assert [cell.name for cell in named.cells()] == [cell.name for cell in plain.cells()]  # digests are in the names
    assert faults_of(suite(variants=variants, reference="ful").cells) == (
        "reference: no 'ful' among lora, full; did you mean 'full'?",
    )
    for reference in ("lora, max_steps=5", "lora"):  # at one place of the grid, and at each one's own
        gridded = suite(variants=variants, grid={"training.max_steps": [5]}, reference=reference)
        assert len(gridded.cells()) == 2


def test_a_grid_may_name_its_values() -> None:
    sources = {"film": {"train": "builtin:movie-sentiment"}, "press": {"train": "builtin:nyt-sentiment"}}
    cells = suite(variants={"lora": {}}, grid={"data": sources, "training.max_steps": [5]}).cells()
    assert [(cell.variant, cell.recipe.data.train) for cell in cells] == [
        ("lora, film, max_steps=5", "builtin:movie-sentiment"),
        ("lora, press, max_steps=5", "builtin:nyt-sentiment"),
    ]


def test_a_section_set_to_null_has_its_defaults() -> None:
    (cell,) = suite(variants={"plain": {"training": None}}).cells()
    assert cell.recipe.training.model_fields_set == set()


def test_excluded_cells_are_those_that_match_every_key_of_a_rule() -> None:
    cells = suite(
        variants={"full": {"method": "full"}, "lora": {"method": "lora"}},
        grid={"backbone.quantization": ["none", "nf4"]},
        seeds=[0, 1],
        exclude=[{"method": "full", "backbone.quantization": "nf4"}, {"variant": "lora, quantization=none", "seed": 1}],
    ).cells()
    assert [(cell.variant, cell.recipe.seed) for cell in cells] == [
        ("full, quantization=none", 0),
        ("full, quantization=none", 1),
        ("lora, quantization=none", 0),
        ("lora, quantization=nf4", 0),
        ("lora, quantization=nf4", 1),
    ]


def test_an_exclusion_that_matches_nothing_is_a_fault() -> None:
    assert faults_of(suite(exclude=[{"method.rnk": 8}]).cells) == (
        "exclude: {'method.rnk': 8} matches no cell. Check its keys and values, or remove it",
    )


def test_every_faulty_cell_is_told_at_once_and_each_fault_once() -> None:
    faults = faults_of(
        suite(
            variants={"a": {"method.rnak": 8}, "b": {"method": "prompt", "method.virtual_tokens": 0}, "c": {}},
            seeds=[0, 1, 2],
        ).cells
    )
    assert len(faults) == 2
    assert faults[0].startswith("a: method.rnak: unknown key; did you mean 'rank'?")
    assert faults[1].startswith("b: method.virtual_tokens:")


def test_a_fault_that_all_cells_share_is_told_without_their_names() -> None:
    faults = faults_of(suite(variants={"a": {}, "b": {"method.rank": 2}}, always={"training.epochs": -1}).cells)
    assert len(faults) == 1
    assert faults[0].startswith("training.epochs:")


def test_two_variants_of_the_same_run_are_refused() -> None:
    (fault,) = faults_of(suite(variants={"a": {"method.rank": 16}, "b": {}}).cells)  # 16 is the default
    assert fault == "b: is the same run as 'a'. Remove one, or exclude it"


def test_a_folder_name_holds_variant_seed_and_digest_and_nothing_a_path_could_misread() -> None:
    (cell,) = suite(variants={"../r=8 | $(x)": {"method.rank": 8}}, seeds=[3]).cells()
    assert cell.name == f"r=8-x-seed3-{cell.recipe.digest[:8]}"


def test_the_name_of_a_cell_is_the_same_however_the_suite_is_written() -> None:
    nested = suite(variants={"x": {"method": {"kind": "lora", "rank": 8}}}, description="one")
    dotted = suite(variants={"x": {"method.rank": 8}, "y": {}}, description="two")
    other = suite(variants={"x": {"method.rank": 9}})
    names = [tested.cells()[0].name for tested in (nested, dotted, other)]
    assert names[0] == names[1] != names[2]


def test_an_unknown_key_and_a_wrong_type_of_a_suite_are_told_together() -> None:
    faults = faults_of(lambda: build_suite({"name": "s", "recipe": {}, "sedes": [1], "seeds": [-1], "grid": {"a": []}}))
    assert any(fault == "sedes: unknown key; did you mean 'seeds'?" for fault in faults)
    assert any(fault.startswith("seeds.0:") for fault in faults)
    assert any(fault.startswith("grid.a:") for fault in faults)
    assert len(faults) == 3


def test_a_seed_named_twice_is_refused() -> None:
    assert faults_of(lambda: suite(seeds=[1, 1])) == ("seeds: [1, 1] names a seed twice",)


def test_a_suite_file_takes_its_recipe_and_data_from_their_own_folders(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "suites").mkdir()
    (tmp_path / "recipes" / "mine.csv").write_text("text,label\n")
    (tmp_path / "recipes" / "r.yaml").write_text(dump_yaml({**BASE, "method": "lora", "data": {"train": "mine.csv"}}))
    path = tmp_path / "suites" / "s.yaml"
    path.write_text(dump_yaml({"name": "s", "recipe": "../recipes/r.yaml"}))
    (cell,) = load_suite(path).cells()
    assert Path(cell.recipe.data.train).samefile(tmp_path / "recipes" / "mine.csv")


def test_overrides_set_the_suites_keys_or_those_of_every_recipe_above_variants(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    recipe = {**BASE, "method": "lora"}
    path.write_text(dump_yaml({"name": "s", "recipe": recipe, "variants": {"v": {"training.epochs": 9}}}))
    cells = load_suite(path, ["seeds=[4, 5]", "training.epochs=1", "recipe.training.batch_size=2"]).cells()
    assert [(c.recipe.seed, c.recipe.training.epochs, c.recipe.training.batch_size) for c in cells] == [
        (4, 1, 2),
        (5, 1, 2),
    ]
    with pytest.raises(InputError, match="not an override"):
        load_suite(path, ["seeds"])


def test_a_suite_reads_back_from_its_own_yaml(tmp_path: Path) -> None:
    tested = suite(
        variants={"x": {"method.rank": 8}}, grid={"training.learning_rate": [1e-4]}, exclude=[{"seed": 1}], seeds=[0, 1]
    )
    path = tmp_path / "suite.yaml"
    path.write_text(dump_yaml(tested.model_dump(mode="json")))
    assert [cell.name for cell in load_suite(path).cells()] == [cell.name for cell in tested.cells()]


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("{name: s, recipe: nowhere.yaml}")
    with pytest.raises(InputError, match=r"cannot read nowhere\.yaml"):
        load_suite(tmp_path / "s.yaml")
