"""The coding of a sorted set of k indices out of n: which entries a sparse payload carries.

Decoding returns exactly the set. Equal sets give equal bytes. Bytes that are not the coding of k indices below n are
refused. For large random sets the bytes stay within 5 % of the entropy ``n H(k / n)`` at every density from 1/1000 to
1/2 (worst near 0.38), and within 2 % at 1/4, 1/16, 1/64 and 1/256. Where the density differs between regions the bytes
go below that bound, because the code adapts per block.

Codings:

* ``ALL``, ``NONE``: k == n, k == 0. No bytes.
* ``BITMAP``: one bit per entry, lowest bit first.
* ``GAPS``: the gaps between neighbouring indices, Rice coded (`rice.py`).
* ``ABSENT``: as ``GAPS``, for the indices that are not in the set. Shorter above density 1/2.
* ``RUNS``: the number (u32) of places where runs of consecutive indices start or stop, then these places as in
  ``GAPS``. Whole rows or layers take a few bytes.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from rayfed.wire.rice import Gaps, decode_gaps, encode_gaps, unpack_bits

MAX_LENGTH = 2**31 - 1
"""The longest vector whose indices can be coded: 8 GB of fp32."""

Indices = npt.NDArray[np.int64]


class Coding(IntEnum):
    """How an index set is written; the numbers are part of the payload format."""

    ALL = 0
    NONE = 1
    BITMAP = 2
    GAPS = 3
    ABSENT = 4
    RUNS = 5


def encode_indices(indices: Indices, n: int) -> tuple[Coding, bytes]:
    """Codes a set of indices in the fewest bytes.

    Args:
        indices: int64, shape (k,), strictly increasing, each from 0 to n - 1.
        n: length of the vector they point into, from 0 to ``MAX_LENGTH``.

    Returns:
        The coding and its bytes. Equal sets give equal bytes.

    Raises:
        ValueError: ``indices`` do not rise strictly from 0 to n - 1.
    """
    if indices.size and (indices[0] < 0 or indices[-1] >= n or (indices[1:] <= indices[:-1]).any()):
        raise ValueError(f"indices: they must rise strictly and lie in 0 to {n - 1}")
    k = indices.size
    if k == n:
        return Coding.ALL, b""
    if k == 0:
        return Coding.NONE, b""
    gaps = _gaps(indices)
    if 2 * int(np.count_nonzero(gaps[1:])) + 2 < min(k, n - k):
        boundaries = _boundaries(indices, np.flatnonzero(gaps[1:]), n)
        best = Coding.RUNS, boundaries.size.to_bytes(4, "little") + encode_gaps(_gaps(boundaries))
    elif k <= n // 2:
        best = Coding.GAPS, encode_gaps(gaps)
    else:
        best = Coding.ABSENT, encode_gaps(_gaps(np.flatnonzero(~_mask(indices, n))))
    if len(best[1]) < (n + 7) // 8:
        return best
    return Coding.BITMAP, np.packbits(_mask(indices, n), bitorder="little").tobytes()


def decode_indices(coding: int, data: bytes | memoryview, n: int, k: int) -> Indices:
    """Reads back what ``encode_indices`` wrote.

    Args:
        coding: the number of a ``Coding`` other than ``ALL``, which needs no indices.
        data: exactly the bytes of the index section.
        n: length of the vector, from 0 to ``MAX_LENGTH``.
        k: how many indices there are, from 0 to n.

    Returns:
        int64, shape (k,), strictly increasing, each from 0 to n - 1.

    Raises:
        ValueError: the bytes are not the coding of k indices below n (unknown coding, wrong length, index out of
            range, another count, padding bits set).
    """
    raw = np.frombuffer(data, np.uint8)
    if coding == Coding.NONE:
        found = np.arange(0)
    elif coding == Coding.BITMAP:
        found = np.flatnonzero(unpack_bits(raw, n))
    elif coding == Coding.GAPS:
        found = decode_gaps(raw, k, n)
    elif coding == Coding.ABSENT:
        found = np.flatnonzero(~_mask(decode_gaps(raw, n - k, n), n))
    elif coding == Coding.RUNS:
        found = _fill_runs(decode_gaps(raw[4:], int.from_bytes(raw[:4].tobytes(), "little"), n), n, k)
    else:
        raise ValueError(f"indices: unknown coding {coding}")
    if found.size != k:
        raise ValueError(f"indices: {found.size} entries where {k} were announced")
    return found


def _gaps(positions: Indices) -> Gaps:
    """The number of entries between each position and the position before it."""
    gaps = positions.astype(np.uint32)
    gaps[1:] -= gaps[:-1].copy()
    gaps[1:] -= 1
    return gaps


def _mask(indices: Indices, n: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(n, np.bool_)
    mask[indices] = True
    return mask


def _boundaries(indices: Indices, breaks: Indices, n: int) -> Indices:
    """Where runs start, stop, start, ..., without a stop at n. ``indices[breaks]`` end all runs but the last."""
    bounds = np.empty(2 * breaks.size + 2, np.int64)
    bounds[0], bounds[-1] = indices[0], indices[-1] + 1
    bounds[1:-1:2], bounds[2:-1:2] = indices[breaks] + 1, indices[breaks + 1]
    return bounds if bounds[-1] < n else bounds[:-1]


def _fill_runs(bounds: Indices, n: int, k: int) -> Indices:
    starts = bounds[0::2]
    lengths = np.append(bounds, n)[1 : 2 * starts.size : 2] - starts
    if lengths.sum() != k:
        raise ValueError(f"indices: runs of {lengths.sum()} entries where {k} were announced")
    before = np.cumsum(lengths) - lengths
    filled: Indices = np.arange(k) + np.repeat(starts - before, lengths)
    return filled
