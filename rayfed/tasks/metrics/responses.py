"""The metrics of written responses: exact match and ROUGE-L, each the mean over the rows, from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

NAMES = ("exact_match", "rouge_l")
"""The names of the `metrics`."""
ANSWER = re.compile(r"#### (-?[0-9.,]+)")  # as in the code of GSM8K, arXiv 2110.14168


def metrics(responses: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Both metrics of responses and as many references; None where there are none."""
    if not responses:
        return dict.fromkeys(NAMES)
    pairs = list(zip(responses, references, strict=True))
    return {
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "rouge_l": sum(rouge_l(*pair) for pair in pairs) / len(pairs),
    }


def exact_match(response: str, reference: str) -> bool:
    """Whether the response gives the reference's answer.

    The answer is the first number behind `####`, without its commas, as in GSM8K. A reference without one is an answer
    as a whole; then white space counts as one space, and none at the ends.
    """
    wanted = ANSWER.search(reference)
    if wanted is None:
        return response.split() == reference.split()
    found = ANSWER.search(response)
    return found is not None and _number(found) == _number(wanted)


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L (Lin 2004) as the package rouge-score has it, without a stemmer.

    Words are the runs of a-z and 0-9 of the lower-case texts. With L, the length of the longest common subsequence of
    words, precision is L over the words of the response, recall is L over those of the reference, and the score is
    their harmonic mean; 0 where that is 0 / 0.
    """
    own, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (response, reference))
    return 2 * _common(own, wanted) / max(len(own) + len(wanted), 1)


def _common(own: Sequence[str], wanted: Sequence[str]) -> int:
    """The length of the longest common subsequence, by Hyyro's bits: bit i is 0 where the length grows at own[i]."""
    places: dict[str, int] = {}
    for i, word in enumerate(own):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(own)) - 1
    row = every
    for word in wanted:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & every
    return len(own) - row.bit_count()


def _number(match: re.Match[str]) -> str:
    return match[1].strip().replace(",", "")
