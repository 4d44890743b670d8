"""The `data` section of a recipe -> its splits as canonical tables."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from peftkit.data.builtin import is_prepared, load_builtin
from peftkit.data.formats import canonical_rows
from peftkit.data.readers import READERS, Raw, dataset_rows, read_file
from peftkit.data.spec import DataSpec, Split
from peftkit.data.table import Row, Shape, Splits, Table
from peftkit.errors import DataError, nearest

BUILTIN_PREFIX = "builtin:"
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val", "eval"),
    "test": ("test",),
}
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


def load_splits(spec: DataSpec, shape: Shape, *, seed: int) -> Splits:
    """The three splits of a recipe, in canonical rows of `shape`.

    Args:
        seed: decides which rows of train a fraction holds out; nothing else here depends on it.

    Raises:
        DataError: a source that is missing, unreachable, empty, malformed or without a needed column; an example that
            cannot be used; a fraction that leaves nothing on one side.
    """
    train = _table(spec.train, "train", spec, shape)
    validation: Table | None = None
    if isinstance(spec.validation, float):
        train, validation = _held_out(train, spec.validation, shape=shape, seed=seed)
    elif spec.validation is not None:
        validation = _table(spec.validation, "validation", spec, shape)
    test = None if spec.test is None else _table(spec.test, "test", spec, shape)
    return Splits(
        train=_limited(train, spec.limit.train),
        validation=validation and _limited(validation, spec.limit.validation),
        test=test and _limited(test, spec.limit.test),
    )


def _table(source: str, split: Split, spec: DataSpec, shape: Shape) -> Table:
    raw = read_source(source, split)
    columns = dict(spec.columns)
    rows = canonical_rows(
        raw.rows, raw.origins, shape, format=spec.format, columns=columns, source=raw.name, untyped=raw.untyped
    )
    return _as_table(rows, raw.origins)


def read_source(source: str, split: Split) -> Raw:
    """The raw rows that a source gives for the slot it stands in.

    Raises:
        DataError: see `load_splits`.
    """
    if source.startswith(BUILTIN_PREFIX):
        name = source.removeprefix(BUILTIN_PREFIX)
        rows = dataset_rows(load_builtin(name, split))
        return Raw(rows, [f"{source}/{split}#{index}" for index in range(len(rows))], f"{source}/{split}")
    files = source_files(source, split)
    if files is None:
        return _hub(source, split)
    parts = [read_file(file) for file in files]
    return Raw(
        rows=[row for part in parts for row in part.rows],
        origins=[origin for part in parts for origin in part.origins],
        name=source,
        untyped=all(part.untyped for part in parts),
    )


def is_at_hand(source: str) -> bool:
    """Whether a source can be read without fetching: files that are there, a packaged data set in the cache."""
    if source.startswith(BUILTIN_PREFIX):
        return is_prepared(source.removeprefix(BUILTIN_PREFIX))
    if re.search(r"[*?\[]", source):
        return bool(glob(source, recursive=True))
    return Path(source).expanduser().exists()


def source_files(source: str, split: Split) -> list[Path] | None:
    """The files a path, folder or glob stands for, sorted; None when the source reads like a hub id.

    Raises:
        DataError: there is no such file, or they are of several formats.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _of_one_format(source, _of_split([file for file in path.rglob("*") if _is_data(file)], split))
    if re.search(r"[*?\[]", source):
        anchor = Path(path.anchor) if path.anchor else Path()
        pattern = str(path.relative_to(path.anchor)) if path.anchor else str(path)
        matches = [file for file in anchor.glob(pattern) if file.is_file()]
        if not matches:
            raise DataError(f"data.{split}: no file matches {source} (looked from {Path.cwd()}).")
        return _of_one_format(source, matches)
    if _HUB_ID.fullmatch(source) and path.suffix.lower() not in READERS:
        return None
    beside = [str(other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"data.{split}: there is no file {source} (looked from {Path.cwd()}){nearest(path.name, beside)}.")


def _is_data(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in READERS and not file.name.startswith((".", "_"))


def _of_split(files: Sequence[Path], split: Split) -> list[Path]:
    """Those named for the split (`train.jsonl`, `test-00000.parquet`) if any file is named for one, else all."""

    def named(file: Path) -> Split | None:
        word = re.split(r"[^a-z]", file.stem.lower())[0]
        return next((known for known, names in SPLIT_NAMES.items() if word in names), None)

    by_name = [(named(file), file) for file in files]
    if all(name is None for name, _ in by_name):
        return list(files)
    return [file for name, file in by_name if name == split]


def _of_one_format(source: str, files: Sequence[Path]) -> list[Path]:
    if not files:
        raise DataError(f"{source} holds no data file for this split. Known formats: {', '.join(READERS)}.")
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1:
        raise DataError(
            f"{source} holds files of several formats: {', '.join(suffixes)}. Name one, as in {source}/*{suffixes[0]}."
        )
    return sorted(files)


def _hub(source: str, split: Split) -> Raw:
    """A data set of the Hugging Face hub: `OWNER/NAME[/CONFIG][:SPLIT]`."""
    parts = _HUB_ID.fullmatch(source)
    assert parts is not None, "the caller matched it"
    return read_hub(parts["repo"], config=parts["config"], split=split, chosen=parts["split"], source=source)


def read_hub(repo: str, *, config: str | None, split: Split, chosen: str | None, source: str) -> Raw:
    """The rows of one split of a hub repository, or of a local folder laid out like one.

    Args:
        chosen: the hub's name of the split; default: the one that `split` is usually called.

    Raises:
        DataError: absent, gated, offline, several configurations, or no such split.
    """
    import datasets

    try:
        names = datasets.get_dataset_split_names(repo, config)
        found = chosen if chosen in names else next((n for n in SPLIT_NAMES[split] if n in names and not chosen), None)
        if found is None:
            wanted = chosen or split
            raise DataError(f"{source} has no split {wanted!r}; it has: {', '.join(names)}. Write {repo}:SPLIT.")
        rows = dataset_rows(datasets.load_dataset(repo, config, split=found))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as fault:
        first_line = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise DataError(
            f"data.{split}: {source} is no file or folder here, and cannot be read from the hub: {first_line} "
            "Check the spelling and the network; a private or gated data set needs `hf auth login` and its terms "
            "accepted; offline, download it and give the path. OWNER/NAME/CONFIG chooses one of several configurations."
        ) from fault
    return Raw(rows, [f"{repo}/{found}#{index}" for index in range(len(rows))], f"{source} ({found})")


def _as_table(rows: Sequence[Row], origins: Sequence[str]) -> Table:
    digest = hashlib.sha256("".join(map(row_digest, rows)).encode()).hexdigest()
    return Table(rows, origins, digest)


def row_digest(row: Row) -> str:
    """SHA-256 of a canonical row's content."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _picked(table: Table, indices: Sequence[int]) -> Table:
    return _as_table([table.rows[i] for i in indices], [table.origins[i] for i in indices])


def _limited(table: Table, limit: int | None) -> Table:
    """The first rows in the order of their content's hash; the same ones whatever the order of the source."""
    if limit is None or limit >= len(table):
        return table
    ordered = sorted(range(len(table)), key=lambda index: (row_digest(table.rows[index]), index))
    return _picked(table, ordered[:limit])


def _held_out(table: Table, fraction: float, *, shape: Shape, seed: int) -> tuple[Table, Table]:
    """Train and validation: every label gives its share; equal rows stay together."""
    copies: dict[str, list[int]] = {}
    for index, row in enumerate(table.rows):
        copies.setdefault(row_digest(row), []).append(index)
    strata: dict[str, list[str]] = {}
    for digest, indices in copies.items():
        label = table.rows[indices[0]]["label"] if shape == "classification" else None
        strata.setdefault("" if isinstance(label, float) else str(label), []).append(digest)
    held: set[int] = set()
    for stratum, count in zip(strata.values(), _shares([len(s) for s in strata.values()], fraction), strict=True):
        shuffled = sorted(stratum, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        held.update(index for digest in shuffled[:count] for index in copies[digest])
    if not 0 < len(held) < len(table):
        raise DataError(
            f"data.validation={fraction} holds out {len(held)} of {len(table)} examples. Choose another fraction."
        )
    kept = [index for index in range(len(table)) if index not in held]
    return _picked(table, kept), _picked(table, sorted(held))


def _shares(sizes: Sequence[int], fraction: float) -> list[int]:
    """Whole numbers near `fraction` of each size that add up to `fraction` of all (largest remainders)."""
    exact = [size * fraction for size in sizes]
    shares = [int(share) for share in exact]
    missing = round(sum(exact)) - sum(shares)
    for index in sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])[:missing]:
        shares[index] += 1
    return shares
