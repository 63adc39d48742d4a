"""Suggestions for a word that is unknown: a known word that differs from it by a slip of the keys."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 100  # characters; what is longer is no slip of the keys


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a slip or two turned into ``word``, or None where there is none. Case does not count.

    A slip is a character too many, too few or wrong, or two neighbours exchanged. About one slip in four characters is
    allowed. Digits must agree: who writes `int4` or `fp64` means that number, and not `int8` or `fp16`.
    """
    if len(word) > LONGEST:
        return None
    found = {one: slips(word.lower(), one.lower()) for one in known if _digits(one) == _digits(word)}
    near = [one for one in found if found[one] <= (max(len(word), len(one)) + 1) // 4]
    return min(near, key=found.__getitem__, default=None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``did you mean WORD? `` with the nearest known word, for the middle of a message; empty where none is near."""
    near = nearest(word, known)
    return f"did you mean {near}? " if near else ""


def slips(word: str, other: str) -> int:
    """The number of slips between two words: their distance of Damerau and Levenshtein, where neighbours swap once."""
    before: list[int] = []
    row = [*range(len(other) + 1)]
    for i, a in enumerate(word):
        above, before = before, row
        row = [i + 1]
        for j, b in enumerate(other):
            row.append(min(before[j + 1] + 1, row[j] + 1, before[j] + (a != b)))
            if i and j and a == other[j - 1] and b == word[i - 1]:
                row[-1] = min(row[-1], above[j - 1] + 1)
    return row[-1]


def _digits(word: str) -> str:
    return "".join(filter(str.isdigit, word))
