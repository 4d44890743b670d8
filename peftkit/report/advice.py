"""Which method to take on this machine and these data: an answer from the records alone, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from peftkit.report.comparison import SIGNIFICANT, Comparison, Difference, compare_rows, signed, unit
from peftkit.report.rows import LOWER_IS_BETTER, CellRow, Summary, common_metric, summarise
from peftkit.report.tables import escape_markdown, failures, format_estimate
from peftkit.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

ENOUGH_SEEDS = 3
MOST_NAMED = 4
Cost = Callable[[Summary], float | None]


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommendation, and everything that speaks for and against it, as sentences.

    Attributes:
        variant: what to take; None where the records carry no recommendation.
        given_up: what another choice would have been better at.
        cautions: what may change the answer.
    """

    variant: str | None
    headline: str
    why: tuple[str, ...]
    given_up: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The sentences below the headline, by what they are; those without any are left out."""
        found = {"why": self.why, "given up": self.given_up, "caution": self.cautions}
        return {name: sentences for name, sentences in found.items() if sentences}

    def to_document(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {name: list(part) if isinstance(part, tuple) else part for name, part in asdict(self).items()}


def advise(rows: Sequence[CellRow]) -> list[Advice]:
    """What to take, for each test split that the runs were scored on; nothing about runs that others made."""
    own = [row for row in rows if row.outside is None]
    data = {row.variant: row.test_data for row in own if row.record is not None}
    splits = list(dict.fromkeys(data.values())) or [""]
    return [advise_on([row for row in own if data.get(row.variant, split) == split]) for split in splits]


def advise_on(rows: Sequence[CellRow]) -> Advice:
    """What to take: the cheapest of the methods that cannot be told from the best one; cheap is memory times time.

    Methods are compared in pairs with the best, each alone here: adjusted for their number, a p-value keeps from
    calling one worse in error, where the error to avoid is to call it as good. One that trains nothing costs nothing.
    Where a cost was not measured of all of them, the next one decides: memory alone, time alone, weights trained; and
    without any, the score. Nobody is a candidate who scores below one that is told apart: seeds that differ widely
    cannot be told from anything.
    """
    summaries = summarise(rows)
    metric = common_metric(summaries)
    scored = [summary for summary in summaries if summary.score is not None]
    if metric is None:
        why = "the methods were scored by different metrics" if scored else "nothing was scored"
        return Advice(None, f"No recommendation: {why}.", (), (), _ends(summaries))
    best = scored[0]
    comparison = compare_rows(rows, best.variant)
    found = {difference.variant: difference for difference in comparison.differences}
    compared = [each for each in scored if each.variant in found]
    as_good = [each for each in compared if _as_good_alone(found[each.variant])]
    tied = list(takewhile(lambda each: each in as_good, compared))
    candidates = [best, *tied]
    cautions = (
        *_below([each for each in as_good if each not in tied]),
        *_doubts(candidates),
        *_unlike(scored, comparison),
        *_ends(summaries),
    )
    sure = [each for each in candidates if not _may_be_guessing(each, metric)]
    if not sure:
        headline = f"{_where(scored)}: take none of them yet."
        why = f"No method is distinguishable from an answer without a model; the best, {best.variant}, has {metric}"
        return Advice(None, headline, (f"{why} {_score_and_level(best)}.",), (), cautions)
    cost, named = _deciding(sure)
    chosen = _least(sure, cost) if named else sure[0]
    return Advice(
        chosen.variant,
        f"{_where(scored)}: take {chosen.variant}.",
        _why(chosen, best, sure, found, metric=metric, named=named),
        (*_given_up(chosen, best, found), *_other_choices(chosen, sure), *_cheaper(chosen, scored, found)),
        (*_guessers(candidates, sure), *cautions),
    )


def render_advice(found: Sequence[Advice]) -> RenderableType:
    """The advice as a terminal shows it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[RenderableType] = []
    for advice in found:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, sentences in advice.parts.items():
            for i, sentence in enumerate(sentences):
                grid.add_row(Text("" if i else name, "dim"), Text(sentence))
        shown += [Text(), Text(advice.headline, "bold"), grid]
    return Group(*shown)


def advice_markdown(found: Sequence[Advice]) -> str:
    """The advice as a section of a report."""
    return "\n\n".join(["## What to take", *map(_advice_block, found)])


def _advice_block(advice: Advice) -> str:
    lines = [f"- *{name}*: {escape_markdown(sentence)}" for name, part in advice.parts.items() for sentence in part]
    return "\n".join([f"**{escape_markdown(advice.headline)}**", "", *lines])


def _as_good_alone(difference: Difference) -> bool:
    return difference.outcome == "undecided" and difference.p_value >= SIGNIFICANT


def _where(scored: Sequence[Summary]) -> str:
    """`On NVIDIA L40S, mine.jsonl`: the machines and data of the scored runs."""
    rows = [row for summary in scored for row in summary.rows]
    machines, tests = [row.machine for row in rows], [row.test_data for row in rows]
    return f"On {_listed(machines) or 'this machine'}{', ' * any(tests)}{_listed(tests)}"


def _guess_level(summary: Summary) -> tuple[str, float] | None:
    """The better of the answers that need no model: what it is called, and its score."""
    score = summary.score
    levels = {} if score is None else {"guessing": score.chance, "the most common label": score.majority}
    known = [(name, level) for name, level in levels.items() if level is not None]
    return max(known, key=lambda item: item[1]) if known else None


def _may_be_guessing(summary: Summary, metric: str) -> bool:
    """Whether the score's interval reaches down to that of an answer without a model."""
    level, score = _guess_level(summary), summary.score
    if level is None or score is None or metric.split()[-1] in LOWER_IS_BETTER:
        return False
    return level[1] >= (score.value if score.low is None else score.low)


def _score_and_level(summary: Summary) -> str:
    level = _guess_level(summary)
    told = "" if level is None else f", and {level[0]} {level[1]:.3f}"
    return f"{format_estimate(summary.score)}{told}"


def _guessers(candidates: Sequence[Summary], sure: Sequence[Summary]) -> tuple[str, ...]:
    """Those that might be as good as the best, and might as well be guessing."""
    names = [each.variant for each in candidates if each not in sure]
    return (f"Left aside, as they cannot be told from guessing either: {_listed(names)}.",) if names else ()


def _below(lost: Sequence[Summary]) -> tuple[str, ...]:
    """Those whose seeds differ too widely to be told from the best, though others that score more are."""
    told = "Left aside, as their seeds differ widely and others that are told apart from the best score more"
    return (f"{told}: {_listed([each.variant for each in lost])}.",) if lost else ()


def _product(summary: Summary) -> float | None:
    return (
        None
        if summary.memory_bytes is None or summary.train_seconds is None
        else (summary.memory_bytes * summary.train_seconds)
    )


COSTS: dict[str, Cost] = {
    "training memory x time": _product,
    "training memory": lambda summary: summary.memory_bytes,
    "training time": lambda summary: summary.train_seconds,
    "weights trained": lambda summary: summary.trainable,
}


def _deciding(candidates: Sequence[Summary]) -> tuple[Cost, str]:
    """The first cost that is known of all that train, and its name; an empty one where none is."""
    for name, cost in COSTS.items():
        if all(_trains_nothing(each) or cost(each) is not None for each in candidates):
            return partial(_cost, cost), name
    return partial(_cost, None), ""


def _cost(cost: Cost | None, summary: Summary) -> float | None:
    if cost is None:
        return None
    return 0.0 if _trains_nothing(summary) else cost(summary)


def _least(candidates: Sequence[Summary], cost: Cost) -> Summary:
    """The cheapest; of several the best."""
    return min(candidates, key=lambda each: cost(each) or 0.0)


def _trains_nothing(summary: Summary) -> bool:
    return summary.trainable == 0


def _why(
    chosen: Summary,
    best: Summary,
    candidates: Sequence[Summary],
    found: Mapping[str, Difference],
    *,
    metric: str,
    named: str,
) -> tuple[str, ...]:
    score = f"{metric} {format_estimate(chosen.score)}"
    if chosen is best:
        first = f"It has the best score: {score}."
    else:
        first = f"It has {score}, {found[chosen.variant].verdict}."
    if len(candidates) > 1:
        cheap = f"the cheapest by {named}" if named else "the best score, as no cost was measured of all of them"
        second = f"Of the {len(candidates)} that are not distinguishable from the best it is {cheap}: {_costs(chosen)}."
    elif len(found) > 0:
        second = f"Every other method that was compared is worse. It takes {_costs(chosen)}."
    else:
        second = f"Nothing could be compared with it. It takes {_costs(chosen)}."
    return first, second


def _costs(summary: Summary) -> str:
    """`318.0 MiB of memory and 12m02s of training, 677k weights`."""
    if _trains_nothing(summary):
        return "no training at all"
    told = [
        f"{format_bytes(summary.memory_bytes)} of memory" if summary.memory_bytes is not None else "",
        f"{format_seconds(summary.train_seconds)} of training" if summary.train_seconds is not None else "",
        f"{format_count(summary.trainable)} weights" if summary.trainable is not None else "",
    ]
    return _listed([each for each in told if each]) or "what was not measured"


def _given_up(chosen: Summary, best: Summary, found: Mapping[str, Difference]) -> tuple[str, ...]:
    """What the best one would have given, and cost."""
    if chosen is best:
        return ()
    difference = found[chosen.variant]
    ratios = _ratios(best, chosen)
    return (
        f"Against {best.variant}, the best: {signed(difference)} {unit(difference.metric)}"
        + (f"; {best.variant} takes {ratios}." if ratios else "."),
    )


def _ratios(one: Summary, other: Summary) -> str:
    """`2.3x the memory and 1.5x the time` of `one` against `other`."""
    pairs = {
        "the memory": (one.memory_bytes, other.memory_bytes),
        "the time": (one.train_seconds, other.train_seconds),
    }
    return _listed([f"{mine / its:.2g}x {name}" for name, (mine, its) in pairs.items() if mine and its])


def _other_choices(chosen: Summary, candidates: Sequence[Summary]) -> tuple[str, ...]:
    """Who of the equals would be cheaper in one respect."""
    sentences = []
    for name, cost, written in (
        ("memory", COSTS["training memory"], format_bytes),
        ("time", COSTS["training time"], format_seconds),
    ):
        mine = cost(chosen)
        able = [each for each in candidates if each is not chosen and cost(each) is not None]
        if mine is None or not able:
            continue
        least = _least(able, cost)
        its = cost(least)
        if its is not None and its < mine:
            sentences.append(f"If {name} is short: {least.variant}, not distinguishable either, with {written(its)}.")
    return tuple(sentences)


def _cheaper(chosen: Summary, scored: Sequence[Summary], found: Mapping[str, Difference]) -> tuple[str, ...]:
    """The best of those that cost less but are worse."""
    cost, _ = _deciding([chosen, *scored])
    mine = cost(chosen)
    for each in scored:
        difference, its = found.get(each.variant), cost(each)
        if difference is None or _as_good_alone(difference) or mine is None or its is None or its >= mine:
            continue
        return (f"{each.variant} is cheaper ({_costs(each)}) and {difference.verdict}.",)
    return ()


def _doubts(candidates: Sequence[Summary]) -> tuple[str, ...]:
    """Too few seeds, seeds that failed, and settings that were not searched."""
    sentences = []
    seeds = min(each.ended_well for each in candidates)
    if seeds < ENOUGH_SEEDS:
        count = "One seed says nothing about others" if seeds == 1 else f"{seeds} seeds say little about others"
        sentences.append(f"{count}: the order may change with the next one. Run seeds=[0, 1, 2].")
    partial = [f"{each.variant} ({each.ended_well} of {len(each.rows)})" for each in candidates if each.failures]
    if partial:
        sentences.append(f"Not every seed ended well: {_listed(partial)}.")
    untuned = [each.variant for each in candidates if any(row.tuned is None for row in each.rows)]
    if len(untuned) == len(candidates):
        sentences.append("No method was tuned: each ran with the settings it was given, and others may do better.")
    elif untuned:
        sentences.append(f"Tuned and untuned are not a fair match. Not tuned: {_listed(untuned)}.")
    return tuple(sentences)


def _unlike(scored: Sequence[Summary], comparison: Comparison) -> tuple[str, ...]:
    """Who has a score but could not be compared; and machines that differ."""
    names = [each.variant for each in scored if each.variant in comparison.left_out]
    sentences = [f"Not compared: {name}, as {comparison.left_out[name]}" for name in names[:MOST_NAMED]]
    machines = list(dict.fromkeys(row.machine for each in scored for row in each.rows if row.record is not None))
    if len(machines) > 1:
        sentences.append(f"Memory and time are of different machines: {_listed(machines)}.")
    if scored[0].main is not None and scored[0].main.startswith("validation "):
        sentences.append("Scores are of validation data, which training may have been chosen by: score a test split.")
    return tuple(sentences)


def _ends(summaries: Sequence[Summary]) -> tuple[str, ...]:
    """The methods without a result."""
    none = [summary for summary in summaries if summary.ended_well == 0]
    found = failures(none)
    told = [f"{each.variant} has no result here: {each.status}, {each.reason.rstrip('.')}." for each in found]
    more = len(told) - MOST_NAMED
    return (*told[:MOST_NAMED], *([f"{more} more have no result."] if more > 0 else []))


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`, each once, empty ones left out."""
    found = [name for name in dict.fromkeys(names) if name]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}" if found else ""
