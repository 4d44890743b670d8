"""The presets: recipes that ship with peftkit, found beside a checkout and inside an installed wheel alike.

`python -m peftkit.presets` writes `recipes/schema.json` anew, which editors check recipes against.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import InputError, OutputError, nearest
from peftkit.files import write_json, write_text
from peftkit.recipe import read_yaml, recipe_schema

SCHEMA_NAME = "schema.json"


@dataclass(frozen=True, slots=True)
class Preset:
    """One shipped recipe."""

    name: str
    description: str
    path: Path


def presets_folder() -> Path:
    """The folder of the presets: inside the package where it was installed as a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_presets() -> list[Preset]:
    """Every preset, in the order of its name."""
    return [
        Preset(path.stem, str(read_yaml(path).get("description", "")), path)
        for path in sorted(presets_folder().glob("*.yaml"))
    ]


def show(name: str) -> str:
    """The text of a preset, its comments included.

    Raises:
        InputError: no preset has this name.
    """
    return find(name).read_text(encoding="utf-8")


def copy(name: str, folder: str | Path = ".") -> Path:
    """Write a preset into `folder`, with the schema that its first line points to, and return the recipe's path.

    Raises:
        InputError: no preset has this name.
        OutputError: the folder already holds a file of that name, or cannot be written.
    """
    source = find(name)
    target = Path(folder) / source.name
    if target.exists():
        raise OutputError(f"{target} is already there and is not overwritten. Choose another folder, or remove it.")
    schema = Path(folder) / SCHEMA_NAME
    if not schema.exists():
        write_json(schema, recipe_schema())
    write_text(target, source.read_text(encoding="utf-8"))
    return target


def find(name: str) -> Path:
    """The path of a preset; its name may carry `.yaml`.

    Raises:
        InputError: no preset has this name.
    """
    known = {path.stem: path for path in presets_folder().glob("*.yaml")}
    stem = name.removesuffix(".yaml")
    if stem not in known:
        raise InputError(
            f"no preset is called {name!r}{nearest(stem, sorted(known))} `peftkit recipes list` shows all {len(known)}."
        )
    return known[stem]


def main() -> None:
    """Write the schema of this version of the recipe beside the presets."""
    path = presets_folder() / SCHEMA_NAME
    write_json(path, recipe_schema())
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
