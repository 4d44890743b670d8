"""Which variants were tuned, and how a report says so."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.report.rows import Summary

TUNED_MARK = "*"
"""Behind the name of a variant whose settings a search chose."""


def is_tuned(summary: Summary) -> bool:
    """Whether a search chose settings of its cells."""
    return any(row.tuned is not None for row in summary.rows)


def trains(summary: Summary) -> bool:
    """Whether it trains anything; what has not ended yet counts as training."""
    return summary.trainable != 0


def tuning_notes(summaries: Sequence[Summary], *, mark: str = TUNED_MARK) -> list[str]:
    """Sentences that say who was tuned and how, and who was not; none where nobody was."""
    tuned = [summary for summary in summaries if is_tuned(summary)]
    if not tuned:
        return []
    found = [row.tuned for summary in tuned for row in summary.rows if row.tuned is not None]
    trials = sorted({int(each["trials"]) for each in found})
    metrics = ", ".join(dict.fromkeys(str(each["metric"]) for each in found))
    counted = f"{trials[0]}" if len(trials) == 1 else f"{trials[0]} to {trials[-1]}"
    keys = ", ".join(dict.fromkeys(key for each in found for key in each["chosen"]))
    lead = f"Tuned ({mark})" if mark else "Tuned"
    notes = [f"{lead}: the best of {counted} trials by validation {metrics}; searched: {keys}."]
    untuned = [summary.variant for summary in summaries if trains(summary) and not is_tuned(summary)]
    if untuned:
        notes.append(f"Not tuned, so no fair match for those: {', '.join(untuned)}.")
    return notes
