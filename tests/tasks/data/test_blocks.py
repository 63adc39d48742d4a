"""Rows of language modelling against rows that are cut by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from rayfed.tasks.data.blocks import blocks, whole_texts
from rayfed.tasks.data.tokens import Tokens

TEXTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11], [12], []]


def tokens_of(texts: list[list[int]]) -> Tokens:
    offsets = np.cumsum([0, *map(len, texts)])
    return Tokens(
        np.array([id for text in texts for id in text], np.int32), offsets, np.zeros(len(texts), np.int64), pad_id=99
    )


def clients(found: tuple[Tokens, np.ndarray, np.ndarray]) -> list[list[list[int]]]:
    """The rows of every client as lists of ids."""
    tokens, rows, starts = found
    lists = [tokens.ids[a:b].tolist() for a, b in pairwise(tokens.offsets)]
    assert (tokens.pad_id, len(tokens), sorted(rows)) == (99, len(lists), list(range(len(lists))))
    return [[lists[row] for row in rows[a:b]] for a, b in pairwise(starts)]


def test_texts_of_fewer_than_two_tokens_are_no_rows() -> None:
    parts = [np.array([1, 3]), np.array([4, 5]), np.array([0, 2])]
    assert clients(whole_texts(tokens_of(TEXTS), parts)) == [[[7, 8, 9, 10, 11]], [], [[1, 2, 3], [5, 6]]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4, [[[4, 7, 8, 9], [10, 11]], [], [[1, 2, 3, 5]]]),
        (5, [[[4, 7, 8, 9, 10]], [], [[1, 2, 3, 5, 6]]]),
        (9, [[[4, 7, 8, 9, 10, 11]], [], [[1, 2, 3, 5, 6]]]),
    ],
)
def test_blocks_join_the_texts_of_one_client_and_leave_no_row_of_one_token(size: int, expected: list) -> None:
    parts = [np.array([1, 3]), np.array([4, 5]), np.array([0, 2])]
    assert clients(blocks(tokens_of(TEXTS), parts, size)) == expected


def test_no_texts_give_no_rows() -> None:
    for found in (whole_texts(tokens_of([]), [np.arange(0)]), blocks(tokens_of([]), [np.arange(0)], 4)):
        assert clients(found) == [[]]
