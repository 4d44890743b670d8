"""Packaged data sets: real ones that ship inside PyPI packages, for machines that reach no hub.

Prepared once into the cache as one Parquet file a split. The splits involve no random generator:

    normalise -> deduplicate -> stratify -> order by SHA-256 of the normalised text -> a tenth test, a tenth validation
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.cache import Package, build_once, fetch, home
from peftkit.data.quiet import quiet_datasets
from peftkit.data.spec import Split
from peftkit.data.table import Row
from peftkit.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

PREPARATION_VERSION = 1
"""Raised when what is written from the same package changes, so that old folders are not used."""

NEUTRAL_BELOW = 0.5
"""Texts whose mean human score lies nearer to zero, on a scale of -4 to 4, have no side and are left out."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

VADER = Package(
    name="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT",
)
CHATTERBOT = Package(
    name="chatterbot-corpus",
    version="1.3.3",
    filename="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    licence="BSD-3-Clause",
)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is never torn apart by a split: the rows that share a text (chat: a first user message).

    Attributes:
        text: normalised; two units never have the same.
        stratum: of which every split gets its share: the label (chat: the file).
    """

    text: str
    stratum: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Builtin:
    """A packaged data set: where it comes from and how its units are made."""

    package: Package
    units: Callable[[Path], list[Unit]]
    description: str


def _sentiment(stem: str, description: str) -> Builtin:
    return Builtin(VADER, lambda path: sentiment_units(_ground_truth(path, stem)), description)


BUILTINS: dict[str, Builtin] = {
    "movie-sentiment": _sentiment("movieReviewSnippets", "sentences of film reviews, negative or positive"),
    "tweet-sentiment": _sentiment("tweets", "tweets, negative or positive"),
    "amazon-sentiment": _sentiment("amazonReviewSnippets", "sentences of product reviews, negative or positive"),
    "nyt-sentiment": _sentiment("nytEditorialSnippets", "sentences of newspaper editorials, negative or positive"),
    "chatterbot-en": Builtin(CHATTERBOT, lambda path: chat_units(_conversations(path)), "short English conversations"),
}


def builtin_names() -> list[str]:
    """The names that `builtin:NAME` takes."""
    return list(BUILTINS)


def load_builtin(name: str, split: Split) -> Dataset:
    """One split of a packaged data set: columns `text`, `label` (sentiment) or `messages` (chat).

    Raises:
        DataError: no packaged data set has this name.
        InputError: the package cannot be fetched.
    """
    if name not in BUILTINS:
        raise DataError(
            f"no packaged data set is called {name!r}{nearest(name, builtin_names())}. "
            f"There are: {', '.join(f'builtin:{known}' for known in builtin_names())}."
        )
    folder = _folder(name)
    build_once(folder, lambda staging: _prepare(BUILTINS[name], staging))
    from datasets import Dataset

    with quiet_datasets() as scratch:
        return Dataset.from_parquet(str(folder / f"{split}.parquet"), cache_dir=scratch, keep_in_memory=True)


def is_prepared(name: str) -> bool:
    """Whether a packaged data set lies in the cache already."""
    return _folder(name).is_dir()


def _folder(name: str) -> Path:
    return home() / "datasets" / f"{name}-v{PREPARATION_VERSION}"


def normalised(text: str) -> str:
    """The text as duplicates are told: casefolded, white space collapsed."""
    return " ".join(text.casefold().split())


def split_units(units: Iterable[Unit]) -> dict[Split, list[Row]]:
    """Rows by split: in every stratum, in hash order, about a tenth of the rows to test, then to validation.

    A unit that begins within the tenth goes there whole.
    """
    strata: dict[str, list[Unit]] = {}
    for unit in units:
        strata.setdefault(unit.stratum, []).append(unit)
    ordered: dict[Split, list[tuple[str, Row]]] = {split: [] for split in SPLITS}
    for stratum in strata.values():
        tenth = round(sum(len(unit.rows) for unit in stratum) / 10)
        taken: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        for key, unit in sorted((_hash(unit.text), unit) for unit in stratum):
            split: Split = "test" if taken["test"] < tenth else "validation" if taken["validation"] < tenth else "train"
            taken[split] += len(unit.rows)
            ordered[split].extend((key, row) for row in unit.rows)
    return {split: [row for _, row in sorted(rows, key=lambda pair: pair[0])] for split, rows in ordered.items()}


def sentiment_units(scored: Iterable[tuple[float, str]]) -> list[Unit]:
    """One unit a distinct text with a side; a text that was scored both ways is left out."""
    texts: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for score, text in scored:
        key = normalised(text)
        if abs(score) >= NEUTRAL_BELOW and key:
            texts.setdefault(key, text.strip())
            labels.setdefault(key, set()).add("positive" if score > 0 else "negative")
    units = []
    for key, text in texts.items():
        if len(labels[key]) == 1:
            (label,) = labels[key]
            units.append(Unit(key, label, ({"text": text, "label": label},)))
    return units


def chat_units(conversations: Iterable[tuple[str, Any]]) -> list[Unit]:
    """One unit a distinct first user message, with its distinct conversations; stratum: the file it first came in."""
    units: dict[str, tuple[str, dict[tuple[str, ...], Row]]] = {}
    for file, turns in conversations:
        messages = as_messages(turns)
        if messages:
            contents = tuple(normalised(message["content"]) for message in messages)
            _, rows = units.setdefault(contents[0], (file, {}))
            rows.setdefault(contents, {"messages": messages})
    return [Unit(first, file, tuple(rows.values())) for first, (file, rows) in units.items()]


def as_messages(turns: Any) -> list[dict[str, str]]:
    """Alternating turns as messages, without an unanswered last one; empty when they make no conversation."""
    if not isinstance(turns, list):
        return []
    contents = ["" if turn is None else str(turn).strip() for turn in turns]
    if not all(contents):
        return []
    answered = len(contents) // 2 * 2
    return [
        {"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents[:answered])
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _prepare(builtin: Builtin, staging: Path) -> None:
    from datasets import Dataset

    splits = split_units(builtin.units(fetch(builtin.package)))
    with quiet_datasets():
        for split, rows in splits.items():
            Dataset.from_list(rows).to_parquet(str(staging / f"{split}.parquet"))


def _ground_truth(path: Path, stem: str) -> list[tuple[float, str]]:
    """Mean human score and text of each line of a file in the archive within the source distribution."""
    with tarfile.open(path) as distribution:
        archive = _member(distribution, f"{VADER.name}-{VADER.version}/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
        text = _member(inner, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").decode("utf-8")
    fields = [line.split("\t") for line in text.splitlines() if line.strip()]
    return [(float(score), sentence) for _, score, sentence in fields]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a file in the pinned archive"
    return file.read()


def _conversations(path: Path) -> list[tuple[str, Any]]:
    """File name and turns of every conversation of the English corpus."""
    from ruamel.yaml import YAML

    found: list[tuple[str, Any]] = []
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith("chatterbot_corpus/data/english/") and name.endswith(".yml"):
                document = YAML(typ="safe", pure=True).load(wheel.read(name).decode("utf-8"))
                found += [(Path(name).stem, turns) for turns in document["conversations"]]
    return found
