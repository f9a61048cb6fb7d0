"""text_metrics.py: values computed by hand."""

from __future__ import annotations

import pytest

from text_metrics import character_error_rate, edit_distance


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance
    assert edit_distance(b, a) == distance


def test_edit_distance_of_words() -> None:
    assert edit_distance(["a", "b", "c"], ["a", "x", "c", "d"]) == 2


def test_error_rate_is_pooled() -> None:
    assert character_error_rate(["A", "ABCDEFGHI"], ["B", "ABCDEFGHI"]) == 0.1  # and not the mean, 0.5
    assert character_error_rate(["AB"], ["ABCDEF"]) == 2


def test_error_rate_of_nothing_is_unmeasured() -> None:
    assert character_error_rate([], []) is None
    assert character_error_rate([""], ["x"]) is None


def test_error_rate_needs_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        character_error_rate(["A", "B"], ["A"])
