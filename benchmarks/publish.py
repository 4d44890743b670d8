"""Take a finished benchmark into the repository: `python benchmarks/publish.py [runs/demo ...]`.

Copies its table, plot and numbers to benchmarks/results/NAME, then writes benchmarks/RESULTS.md and the README's table
from what lies there: suites by their report, scripts (`vs_trl.py` and the like) by the JSON files that they left.
`--check` writes nothing and exits 1 when either is stale.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.files import write_text
from peftkit.report.tables import escape_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PUBLISHED = ("report.md", "results.csv", "results.parquet", "differences.csv", "scatter.png", "suite.yaml")
COSTS = ("trained", "memory", "time", "seeds")
SPEED = ("job", "peer", "tokens/s", "peer's", "ratio", "memory", "peer's memory", "memory ratio", "training loss")
README_TABLES: dict[str, tuple[str, Sequence[str]]] = {
    "demo table": ("demo/report.md", ()),
    "what fits": ("what-fits/tokens-1024.json", ()),
    "methods classify": ("methods-classify/report.md", ("variant", "accuracy", *COSTS)),
    "methods chat": ("methods-chat/report.md", ("variant", "perplexity", "token_accuracy", *COSTS)),
    "chat against TRL": ("vs-trl", SPEED),
    "classification against Trainer": ("vs-trainer", SPEED),
}
"""The README's generated tables, by the word in their marker: the report, file or folder of files that has their rows,
and the columns to show; all where none is named."""
HEADER = """# Results

Written by `python benchmarks/publish.py` from what committed commands printed; do not edit. Each section names the
command that makes it again. Machines differ: compare figures within a section, not across sections.
"""


def main(arguments: list[str]) -> int:
    """Publish the named runs and write the documents, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    for run in options.runs:
        publish(run)
    generated = documents()
    if not options.check:
        for path, text in generated.items():
            write_text(path, text)
        return 0
    stale = [path for path, text in generated.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is stale: run `python benchmarks/publish.py`", file=sys.stderr)
    return 1 if stale else 0


def publish(run: Path) -> None:
    """Copy what a person reads of a run's folder."""
    title = (run / "report.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    folder = RESULTS / title.replace("\\", "")
    folder.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)


def documents() -> dict[Path, str]:
    """The generated documents: path -> text."""
    folders = sorted(RESULTS.iterdir())
    sections = [section(folder) for folder in folders if (folder / "report.md").is_file()]
    sections += [measured_section(folder) for folder in folders if [*folder.glob("*.json")]]
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for word, (source, columns) in README_TABLES.items():
        text = with_table(text, word, RESULTS / source, columns)
    return {ROOT / "benchmarks" / "RESULTS.md": "\n".join([HEADER, *sections]), readme: text}


def with_table(text: str, word: str, source: Path, columns: Sequence[str]) -> str:
    """The text with the generated table between its markers."""
    block = re.compile(rf"(<!-- {word}: benchmarks/publish.py -->\n).*?(<!-- end -->)", re.DOTALL)
    if source.suffix == ".md":
        table = report_table(source, columns)
    else:
        files = sorted(source.glob("*.json")) if source.is_dir() else [source]
        rows = [row for path in files for row in read_measured(path)["rows"]]
        table = markdown_table([{name: row[name] for name in columns or row} for row in rows])
    return block.sub(lambda found: found.group(1) + table + "\n" + found.group(2), text)


def section(folder: Path) -> str:
    """A run's report, one heading level down, its links pointing into its folder."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)
    text = re.sub(
        r"\]\((scatter\.png|results\.csv|results\.parquet|differences\.csv)\)", rf"](results/{folder.name}/\1)", text
    )
    command = f"peftkit bench benchmarks/{folder.name.replace('-', '_')}.yaml --out runs/{folder.name}"
    return re.sub(r"```\npeftkit bench .*?\n```", f"```\n{command}\n```", text, flags=re.DOTALL)


def measured_section(folder: Path) -> str:
    """What a script measured: its files' rows, those of the same note and columns in one table, and how to repeat it.

    A file has `note`, `command`, `rows` (texts by column) and `environment`.
    """
    documents = [read_measured(path) for path in sorted(folder.glob("*.json"))]
    tables: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for document in documents:
        tables.setdefault((document["note"], *document["rows"][0]), []).extend(document["rows"])
    parts = [f"## {folder.name}"]
    for (note, *_), rows in tables.items():
        parts += [note, markdown_table(rows)]
    commands = dict.fromkeys(document["command"] for document in documents)
    parts += ["### How to reproduce", "```\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join([*parts, environment_table(documents)]) + "\n"


def environment_table(documents: list[dict[str, Any]]) -> str:
    """The machines and versions of the documents, one line each; values that differ stand side by side."""
    seen: dict[str, list[str]] = {}
    for document in documents:
        flat = document["environment"] | {
            "packages": ", ".join(map(" ".join, document["environment"]["packages"].items()))
        }
        for name, value in flat.items():
            seen.setdefault(name, []).append(str(value))
    lines = ["| environment | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {'; '.join(dict.fromkeys(values))} |" for name, values in seen.items())])


def read_measured(path: Path) -> dict[str, Any]:
    """What a script left."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows of the same columns, all but the first aligned right."""
    columns = [*rows[0]]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *([*row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in lines)


def report_table(path: Path, columns: Sequence[str] = ()) -> str:
    """The table of a suite's report, or some of its columns."""
    lines = path.read_text(encoding="utf-8").splitlines()
    below = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    rows = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in itertools.takewhile(lambda line: line.startswith("|"), below)
    ]
    names = [name.strip() for name in rows[0]]
    shown = [names.index(column) for column in columns or names]
    return "\n".join(f"|{'|'.join(row[place] for place in shown)}|" for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
