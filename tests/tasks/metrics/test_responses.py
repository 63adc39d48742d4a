"""Exact match and ROUGE-L against values worked out by hand, and against the textbook's table."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed.tasks.metrics.responses import exact_match, metrics, rouge_l


@pytest.mark.parametrize(
    ("response", "reference", "same"),
    [
        ("6 + 6 = 12\n#### 12", "It is a dozen.\n#### 12", True),
        ("#### 1,200 and #### 7", "#### 1200", True),  # the first one counts, without commas
        ("#### -3", "#### 3", False),
        ("the answer is 12", "#### 12", False),
        (" Paris \n", "Paris", True),
        ("paris", "Paris", False),
        ("", "#### 1", False),
    ],
)
def test_the_answer_counts(response: str, reference: str, same: bool) -> None:
    assert exact_match(response, reference) is same


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        ("police kill the gunman", "Police killed the gunman.", 3 / 4),  # Lin's example: police, the, gunman
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a b c d", "a x c", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("It's 4,000!", "it s 4 000", 1),  # words are runs of letters and digits
        ("", "words", 0),
        ("\u00e9", "!", 0),
    ],
)
def test_rouge_l_by_hand(response: str, reference: str, score: float) -> None:
    assert rouge_l(response, reference) == pytest.approx(score)


@given(st.text("abc ", max_size=30), st.text("abc ", max_size=30))
def test_rouge_l_by_the_table_of_prefixes(response: str, reference: str) -> None:
    own, wanted = (re.findall("[a-z0-9]+", text) for text in (response, reference))
    table = [[0] * (len(wanted) + 1) for _ in range(len(own) + 1)]
    for i, x in enumerate(own):
        for j, y in enumerate(wanted):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    total = len(own) + len(wanted)
    assert rouge_l(response, reference) == pytest.approx(2 * table[-1][-1] / total if total else 0)


def test_the_metrics_are_means_and_nothing_has_none() -> None:
    assert metrics(["a", "b"], ["a", "c"]) == {"exact_match": 0.5, "rouge_l": 0.5}
    assert metrics([], []) == {"exact_match": None, "rouge_l": None}
