"""Variants against a reference, over the same test examples in pairs: differences, tests and verdicts in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import InputError, nearest
from peftkit.files import write_text
from peftkit.record import RECORD_NAME
from peftkit.report.rows import (
    LOWER_IS_BETTER,
    MANIFEST_NAME,
    CellRow,
    common_metric,
    find_cells,
    read_cells,
    readable_scores,
    summarise,
)
from peftkit.report.scores import SHARES, RunScores, read_run_scores, resamples_over_runs, values_over_runs

USUAL_REFERENCE = "lora"
SIGNIFICANT = 0.05
Outcome = Literal["better", "worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One variant minus the reference, over the same examples.

    Attributes:
        low, high: 95 % interval over what `basis` says.
        p_value: two-sided; below 0.05 where the interval leaves zero out, unless few examples differ.
        adjusted_p: by Holm for all differences of the comparison; it decides the outcome.
        detectable: the true difference that would have been seen four times in five.
        paired_seeds: both sides ran the same seeds, and these are matched.
    """

    variant: str
    reference: str
    metric: str
    value: float
    low: float
    high: float
    p_value: float
    adjusted_p: float
    num_examples: int
    num_seeds: int
    detectable: float
    verdict: str
    outcome: Outcome
    basis: str
    reference_seeds: int
    paired_seeds: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences by one metric, in the order of the variants' scores; `left_out` says who has none, and why."""

    metric: str
    differences: Sequence[Difference]
    left_out: Mapping[str, str]

    @property
    def regressions(self) -> list[Difference]:
        """The differences that are significant and for the worse."""
        return [difference for difference in self.differences if difference.outcome == "worse"]

    def to_document(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "metric": self.metric,
            "differences": [asdict(difference) for difference in self.differences],
            "left_out": dict(self.left_out),
            "regressions": [difference.variant for difference in self.regressions],
        }


@dataclass(frozen=True, slots=True)
class _Pair:
    """The runs of a variant, and those it is compared with."""

    variant: str
    rows: Sequence[CellRow]
    reference: str
    reference_rows: Sequence[CellRow]


@dataclass(frozen=True, slots=True)
class _Runs:
    """One side's finished runs, by seed, all scored on the same test."""

    seeds: tuple[int, ...]
    scores: tuple[RunScores, ...]


@dataclass(frozen=True, slots=True)
class _Match:
    """Two sides that can be compared."""

    pair: _Pair
    one: _Runs
    other: _Runs

    @property
    def paired(self) -> bool:
        """Whether the seeds too are matched."""
        return self.one.seeds == self.other.seeds and len(set(self.one.seeds)) == len(self.one.seeds)

    @property
    def shape(self) -> tuple[int, int, bool, int]:
        """What is equal for matches that are worked out at once."""
        return len(self.one.seeds), len(self.other.seeds), self.paired, self.one.scores[0].test.num_rows


def compare_variants(rows: Sequence[CellRow], reference: str | None = None) -> list[Difference]:
    """The differences of `compare_rows`.

    Raises:
        InputError: there is no variant of the reference's name.
    """
    return list(compare_rows(rows, reference).differences)


def compare_rows(rows: Sequence[CellRow], reference: str | None = None) -> Comparison:
    """Every variant against the reference: the one named, else `lora`, else the best; by the metric that all share.

    A reference that stands at several places of a grid (`lora, film` and `lora, press`) may be named without them
    (`lora`): then each variant is compared with the one at its own place.

    Raises:
        InputError: there is no variant of the reference's name.
    """
    summaries = summarise(rows)
    sides = {summary.variant: summary.rows for summary in summaries}
    if reference is not None and not is_reference(reference, sides):
        names = list(sides)
        raise InputError(f"no variant {reference!r} among {', '.join(names)}{nearest(reference, names)}")
    metric = common_metric(summaries)
    able = [name for name, side in sides.items() if any(metric in run.scores for run in readable_scores(side))]
    if metric is None or len(sides) < 2 or not able:
        return Comparison(metric or "", [], {})
    chosen = reference or (USUAL_REFERENCE if USUAL_REFERENCE in able else able[0])
    opponents = {name: chosen if chosen in sides else f"{chosen}, {name.partition(', ')[2]}" for name in sides}
    others = [name for name in sides if opponents[name] != name]
    pairs = [_Pair(name, sides[name], opponents[name], sides.get(opponents[name], ())) for name in others]
    return _compare(pairs, metric)


def is_reference(name: str, variants: Iterable[str]) -> bool:
    """Whether a variant is called so, alone or before its place on a grid."""
    return any(variant == name or variant.startswith(f"{name}, ") for variant in variants)


def compare_folders(one: Path, other: Path, metric: str | None = None) -> Comparison:
    """`other` against `one`: two runs, or the variants of the same name of two suites.

    Raises:
        InputError: a folder has no run, one is a run and the other a suite, or nothing in them can be compared.
    """
    before, after = _grouped(one), _grouped(other)
    if _is_run(one) != _is_run(other):
        run, suite = (one, other) if _is_run(one) else (other, one)
        raise InputError(f"{run} is one run and {suite} has several. Name two runs, or two folders of a benchmark.")
    metric = metric or _shared_metric(before, after)
    if _is_run(one):
        names = (one.resolve().name, other.resolve().name)
        old, new = names if names[0] != names[1] else (str(one), str(other))
        pairs = [_Pair(new, next(iter(after.values())), old, next(iter(before.values())))]
    else:
        pairs = [_Pair(name, after.get(name, []), str(one), before.get(name, [])) for name in {**before, **after}]
    comparison = _compare(pairs, metric)
    if not comparison.differences:
        held: dict[str, list[str]] = {}
        for name, reason in comparison.left_out.items():
            held.setdefault(reason, []).append(name)
        reasons = " ".join(f"{', '.join(holders)}: {reason}" for reason, holders in held.items())
        raise InputError(f"{one} and {other} cannot be compared by {metric}. {reasons}")
    return comparison


def write_differences(comparison: Comparison, path: Path) -> None:
    """One line a difference, as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Difference)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(difference) for difference in comparison.differences)
    write_text(path, stream.getvalue())


def unit(metric: str) -> str:
    """`points of accuracy` for what goes from 0 to 1, else the metric itself."""
    name = metric.split()[-1]
    return f"points of {name}" if name in SHARES else name


def signed(difference: Difference) -> str:
    """`-1.0 [-2.4, 0.4]`, in the metric's unit."""
    low, high = (_number(bound, difference.metric) for bound in (difference.low, difference.high))
    return f"{_number(difference.value, difference.metric, sign='+')} [{low}, {high}]"


def brief(difference: Difference, family: int) -> str:
    """The verdict in so few words that it fits a terminal's line behind name and numbers."""
    if difference.outcome != "undecided":
        return f"{difference.outcome}, p {probability(difference.adjusted_p)}"
    if difference.detectable == 0:
        return "the same on every example"
    if difference.p_value < SIGNIFICANT:
        return f"not distinguishable among {family} (alone p {probability(difference.p_value)})"
    seen = _number(difference.detectable, difference.metric) if _can_be(difference) else "no difference"
    return f"not distinguishable; {seen} would be"


def _can_be(difference: Difference) -> bool:
    """Whether the metric can differ by what would have been seen: with two seeds that may be more than a share has."""
    return difference.metric.split()[-1] not in SHARES or difference.detectable < 1


def probability(value: float) -> str:
    """`= 0.031`; none is told below a thousandth."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _number(value: float, metric: str, *, sign: str = "-") -> str:
    share = metric.split()[-1] in SHARES
    return f"{100 * value:{sign}.1f}" if share else f"{value:{sign}.3g}"


def _compare(pairs: Sequence[_Pair], metric: str) -> Comparison:
    from peftkit.stats.means import holm

    groups: dict[tuple[int, int, bool, int], list[_Match]] = {}
    left_out: dict[str, str] = {}
    for pair in pairs:
        try:
            match = _matched(pair, metric)
        except InputError as fault:
            left_out[pair.variant] = str(fault)
        else:
            groups.setdefault(match.shape, []).append(match)
    by_variant = {found.variant: found for group in groups.values() for found in _differences(group, metric)}
    found = [by_variant[pair.variant] for pair in pairs if pair.variant in by_variant]
    adjusted = holm([difference.p_value for difference in found])
    return Comparison(metric, [_judged(*each, len(found)) for each in zip(found, adjusted, strict=True)], left_out)


def _matched(pair: _Pair, metric: str) -> _Match:
    """The pair with its predictions.

    Raises:
        InputError: a side cannot be compared, or not with the other.
    """
    one = _runs(pair.rows, metric)
    try:
        other = _runs(pair.reference_rows, metric)
    except InputError as fault:
        raise InputError(f"in {pair.reference}, {fault}") from fault
    if one.scores[0].test != other.scores[0].test:
        raise InputError(_unlike(one.scores[0], other.scores[0], pair.reference))
    if one.scores[0].test.num_rows < 2:
        raise InputError("one test example is not enough for a comparison. Score more.")
    return _Match(pair, one, other)


def _differences(group: Sequence[_Match], metric: str) -> list[Difference]:
    """Differences of matches of one shape, not yet judged."""
    import numpy as np

    from peftkit.stats.means import difference_over_seeds

    sides = [[match.one.scores for match in group], [match.other.scores for match in group]]
    values_KSN, reference_KSN = (np.concatenate([values_over_runs(runs, [metric]) for runs in side]) for side in sides)
    drawn, reference = ([resamples_over_runs(runs, metric) for runs in side] for side in sides)
    pairs = [(mine, its) for mine, its in zip(drawn, reference, strict=True) if mine is not None and its is not None]
    resampled_RK = np.stack([mine - its for mine, its in pairs], axis=1) if pairs else None
    found = difference_over_seeds(values_KSN, reference_KSN, resampled_RK, paired=group[0].paired)
    low_K, high_K = found.interval()
    p_K, detectable_K = found.p_values(), found.detectable()
    if metric.split()[-1] in SHARES:  # two seeds that differ give more than shares can differ by
        low_K, high_K = low_K.clip(-1, 1), high_K.clip(-1, 1)
    return [
        Difference(
            variant=match.pair.variant,
            reference=match.pair.reference,
            metric=metric,
            value=float(found.value_K[k]),
            low=float(low_K[k]),
            high=float(high_K[k]),
            p_value=float(p_K[k]),
            adjusted_p=1.0,
            num_examples=values_KSN.shape[-1],
            num_seeds=len(match.one.seeds),
            detectable=float(detectable_K[k]),
            verdict="",
            outcome="undecided",
            basis="seeds and examples" if found.seeds else "examples",
            reference_seeds=len(match.other.seeds),
            paired_seeds=match.paired,
        )
        for k, match in enumerate(group)
    ]


def _runs(rows: Sequence[CellRow], metric: str) -> _Runs:
    finished = sorted((row for row in rows if row.status == "ok"), key=lambda row: row.seed)
    if not finished:
        ends = ", ".join(dict.fromkeys(row.status for row in rows)) or "not there"
        raise InputError(f"no finished run ({ends}).")
    scores = tuple(read_run_scores(row.folder, row.record) for row in finished if row.record is not None)
    if len({run.test for run in scores}) > 1:
        raise InputError("its runs were scored on different examples.")
    known = list(scores[0].scores)
    if metric not in known:
        raise InputError(f"its predictions tell {', '.join(known)}, and not {metric!r}{nearest(metric, known)}")
    return _Runs(tuple(row.seed for row in finished), scores)


def _unlike(one: RunScores, other: RunScores, reference: str) -> str:
    if one.test.kind != other.test.kind:
        return f"its predictions are {one.test.kind}, those of {reference} are {other.test.kind}."
    if one.test.rows != other.test.rows:
        return f"its {one.test.num_rows:,} test rows are not the {other.test.num_rows:,} of {reference}."
    return f"its test rows have other {one.test.answers} than those of {reference}. Score both on the same file."


def _judged(difference: Difference, adjusted_p: float, family: int) -> Difference:
    """The difference with its outcome and its verdict, as one of so many."""
    judged = replace(difference, adjusted_p=adjusted_p)
    lower_is_better = judged.metric.split()[-1] in LOWER_IS_BETTER
    direction: Outcome = "better" if (judged.value < 0) == lower_is_better else "worse"
    bounds = (judged.low, judged.high) if judged.value >= 0 else (-judged.high, -judged.low)
    low, high = (_number(bound, judged.metric) for bound in bounds)
    size = f"{direction} than {judged.reference} by {_amount(abs(judged.value), judged.metric)} [{low}, {high}]"
    if adjusted_p < SIGNIFICANT:
        return replace(judged, outcome=direction, verdict=size)
    if judged.p_value < SIGNIFICANT:
        return replace(judged, verdict=f"{size} if compared alone, not as one of {family} comparisons (Holm)")
    if judged.detectable == 0:
        return replace(judged, verdict=f"the same as {judged.reference} on every example")
    seeds = f"{judged.num_seeds} seed{'s'[: judged.num_seeds != 1]}"
    against = "" if judged.num_seeds == judged.reference_seeds else f" against {judged.reference_seeds}"
    found = f"a difference of {_amount(judged.detectable, judged.metric)}" if _can_be(judged) else "no difference"
    seen = f"{found} would have been seen"
    where = f"at n={judged.num_examples:,} and {seeds}{against}"
    return replace(judged, verdict=f"not distinguishable from {judged.reference} {where}; {seen}")


def _amount(value: float, metric: str) -> str:
    name = metric.split()[-1]
    return f"{_number(value, metric)} points" if name in SHARES else f"{_number(value, metric)} in {name}"


def _grouped(folder: Path) -> dict[str, list[CellRow]]:
    """The runs of a folder by variant."""
    rows = read_cells(find_cells(folder))
    if not rows:
        raise InputError(f"{folder} holds no finished run. Name a folder that train or bench wrote.")
    found: dict[str, list[CellRow]] = {}
    for row in rows:
        found.setdefault(row.variant, []).append(row)
    return found


def _is_run(folder: Path) -> bool:
    return (folder / RECORD_NAME).exists() and not (folder / MANIFEST_NAME).exists()


def _shared_metric(*sides: Mapping[str, Sequence[CellRow]]) -> str:
    """The metric that decides on both sides."""
    summaries = [summary for side in sides for rows in side.values() for summary in summarise(rows)]
    metric = common_metric(summaries)
    if metric is None:
        found = ", ".join(sorted({summary.main for summary in summaries if summary.main is not None}))
        raise InputError(f"the runs share no deciding metric ({found or 'none was scored'}). Name one with --metric.")
    return metric
