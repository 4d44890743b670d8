"""The house rules that a reader can break without noticing: who imports whom, what loads torch, how long files get."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from peftkit.methods import ALIASES, AnyMethod

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peftkit"
RINGS = {
    0: {"errors", "units", "stats", "files", "cache", "spec", "environment", "extras", "threads", "onednn"},
    1: {"methods", "tasks", "data", "backbones", "kernels"},
    2: {"recipe", "record", "folder", "digests"},
    3: {"run", "prepare", "train", "plan", "deploy", "report", "presets", "doctor"},
    4: {"cli", "bench", "__main__"},
}
RING_OF = {name: ring for ring, names in RINGS.items() for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(tree: ast.AST, *, typing_only: bool) -> Iterator[str]:
    """Names of the imported modules; those under `if TYPE_CHECKING` only when asked for."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test) and not typing_only:
        children = list(tree.orelse)
    else:
        children = list(ast.iter_child_nodes(tree))
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    if isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, "imports are absolute"
        for alias in tree.names:
            inner = f"{tree.module}.{alias.name}"
            yield inner if inner in MODULES else str(tree.module)
    for child in children:
        yield from imports(child, typing_only=typing_only)


def own_imports(module: str, *, typing_only: bool) -> set[str]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return {name for name in imports(tree, typing_only=typing_only) if name.split(".")[0] == "peftkit"} - {module}


def ring_of(module: str) -> int | None:
    """The ring of a module; None for the package itself, whose names are loaded when they are used."""
    parts = module.split(".")
    return RING_OF.get(parts[1]) if len(parts) > 1 else None


def test_every_module_has_a_ring() -> None:
    unplaced = sorted({module.split(".")[1] for module in MODULES if "." in module} - set(RING_OF))
    assert not unplaced, f"give these a ring in DESIGN's table and here: {unplaced}"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "peftkit"])
def test_imports_never_point_up(module: str) -> None:
    mine = ring_of(module)
    assert mine is not None
    above = {name for name in own_imports(module, typing_only=True) if (ring_of(name) or 0) > mine}
    assert not above, f"{module} is of ring {mine} and imports {sorted(above)}"


def test_imports_go_in_no_circle() -> None:
    edges = {module: own_imports(module, typing_only=False) for module in MODULES}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in finished:
            for other in sorted(edges.get(module, set())):
                visit(other, (*trail, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


HEAVY = "('torch', 'transformers', 'datasets', 'peft', 'matplotlib', 'sklearn', 'scipy', 'accelerate')"
WATCH = (
    f"import sys; loaded = [n for n in {HEAVY} if n in sys.modules]; sys.exit(f'loaded {{loaded}}' if loaded else 0)"
)


def loads_nothing_heavy(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{code}\n{WATCH}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [module for module in MODULES if ring_of(module) in (0, 2)])
def test_rings_0_and_2_load_without_torch(module: str) -> None:
    loads_nothing_heavy(f"import {module}")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipes", "list"], ["recipes", "show", "chat-lora"], ["report", "RUN"]]
)
def test_light_verbs_answer_without_torch(arguments: list[str], tmp_path: Path) -> None:
    record = {"peftkit_version": "0", "recipe": {}, "recipe_digest": "0", "label": "lora", "seed": 0, "status": "ok"}
    metric = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 10}
    document = record | {"environment": {}, "metrics": {"accuracy": metric}}
    (tmp_path / "record.json").write_text(json.dumps(document))
    given = [str(tmp_path) if word == "RUN" else word for word in arguments]
    loads_nothing_heavy(
        "import contextlib, io\n"
        "from peftkit.cli import main\n"
        "said = io.StringIO()\n"
        "with contextlib.redirect_stdout(said):\n"
        "    try:\n"
        f"        code = main({given!r})\n"
        "    except SystemExit as end:\n"
        "        code = end.code\n"
        "assert code == 0, code\n"
        "assert 'lora' in said.getvalue() or 'merge' in said.getvalue(), said.getvalue()"
    )


def test_the_package_itself_loads_without_torch() -> None:
    loads_nothing_heavy("import peftkit")


ORDINARY_WORDS = {"full", "head", "peft", "prompt"}
"""Names of methods that are words of the trade as well, and so can't be looked for."""


def test_no_method_is_named_in_the_training_loop() -> None:
    kinds = {member.model_fields["kind"].default for member in get_args(get_args(AnyMethod)[0])}
    names = (kinds | set(ALIASES) | {"dora", "rslora", "pissa"}) - ORDINARY_WORDS
    assert {"lora", "qlora", "prefix", "few-shot"} <= names
    pattern = re.compile(rf"(?<![a-z])({'|'.join(re.escape(name) for name in sorted(names))})(?![a-z])", re.IGNORECASE)
    named = [
        f"{path.name}:{token.start[0]}: {token.string}"
        for path in FILES
        if path.is_relative_to(PACKAGE / "train")
        for token in code_tokens(path)
        if pattern.search(token.string)
    ]
    assert not named


def code_tokens(path: Path) -> Iterator[tokenize.TokenInfo]:
    """Names and strings of a file, without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    bare = {
        node.lineno
        for owner in documented
        for node in owner.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.NAME, tokenize.STRING) and token.start[0] not in bare:
                yield token


def test_only_the_cell_catches_everything() -> None:
    broad = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if path != PACKAGE / "bench" / "cell.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or "Exception" in names_in(node.type))
    ]
    assert not broad


def names_in(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_the_wheel_holds_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    present = {module_of(path) for path in FILES if path.name == "__init__.py"}
    assert set(settings["packages"]) == present | {"peftkit.recipes"}
    assert settings["package-dir"] == {"peftkit.recipes": "recipes"}


def test_sources_are_formatted_and_lint_free() -> None:
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
