"""Rows of language modelling: pieces of texts with at least one next token, and the rows of every client.

A piece is a text, or with `data.packing` a block of a client's joined texts. A row of one token has no next token to
predict, so it is left out: otherwise the mean over the tokens of a batch could be 0 / 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from rayfed.tasks.data.tokens import Tokens

SHORTEST = 2  # tokens of a row: one to see and one to predict


def whole_texts(tokens: Tokens, parts: Sequence[np.ndarray]) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """(rows, indices, starts) as a `Federation` has them: one row a text, in the order of the texts.

    ``parts`` has the texts of every client, as indices.
    """
    used = tokens.lengths >= SHORTEST
    ends = tokens.offsets[1:][used]
    return _pieces(tokens, ends - tokens.lengths[used], ends), *used_rows(used, parts)


def used_rows(used: np.ndarray, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(indices, starts) of ``parts`` where only the ``used`` rows (n,) are left, numbered in their order."""
    number = np.cumsum(used) - 1
    chosen = [number[part[used[part]]] for part in parts]
    return _joined(chosen), np.cumsum([0, *map(len, chosen)], dtype=np.int64)


def blocks(tokens: Tokens, parts: Sequence[np.ndarray], size: int) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """The same with rows of ``size`` tokens, the last of a client shorter: its texts joined in their order, and cut.

    Rows are numbered client after client. 0 to ``size`` - 1 last tokens of a client are a shorter row, or, if there is
    one alone, no row.
    """
    order = _joined(parts)
    joined = _pieces(tokens, tokens.offsets[order], tokens.offsets[order + 1])
    ends = joined.offsets[np.cumsum([0, *map(len, parts)])]  # where the tokens of each client end, from 0
    first = [np.arange(start, stop - SHORTEST + 1, size) for start, stop in pairwise(ends)]
    last = [np.minimum(rows + size, stop) for rows, stop in zip(first, ends[1:])]
    starts = np.cumsum([0, *map(len, first)], dtype=np.int64)
    return _pieces(joined, _joined(first), _joined(last)), np.arange(starts[-1]), starts


def _pieces(tokens: Tokens, first: np.ndarray, last: np.ndarray) -> Tokens:
    """The rows ``ids[first[i]:last[i]]``."""
    lengths = last - first
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.repeat(first - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Tokens(tokens.ids[places], offsets, np.zeros(len(first), dtype=np.int64), tokens.pad_id)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)
