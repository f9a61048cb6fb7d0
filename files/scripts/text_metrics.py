"""Metrics on read texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Levenshtein distance (insertions, deletions and substitutions cost 1), by Wagner and Fischer 1974."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def character_error_rate(
    truths: Sequence[str],
    readings: Sequence[str],
    distance: Callable[[Sequence[object], Sequence[object]], int] = edit_distance,
) -> float | None:
    """Pooled CER: the sum of edit distances over the sum of the truths' lengths; None without a character.

    ``distance`` may be a faster Levenshtein distance where there is one.  Raises ``ValueError`` when the two
    sequences differ in length.
    """
    characters = sum(len(truth) for truth in truths)
    errors = sum(distance(truth, reading) for truth, reading in zip(truths, readings, strict=True))
    return errors / characters if characters else None
