"""The coding of a sorted set of k indices out of n: which entries a sparse payload carries.

Promises: decoding gives back exactly the set; equal sets give equal bytes; bytes that are not the coding of k indices
below n are refused. For large random sets the bytes stay within 5 % of the entropy ``n H(k / n)`` at every density from
1/1000 to 1/2 (worst near 0.38), and within 2 % at 1/4, 1/16, 1/64 and 1/256. Where density differs between regions they
go below that bound, because the code adapts per block.

Codings:

* ``ALL``, ``NONE``: k == n, k == 0. No bytes.
* ``BITMAP``: one bit per entry, lowest bit first.
* ``GAPS``: the gaps between neighbours, Rice coded (Rice & Plaunt 1971; near optimal for the geometric gaps of
  a random set: Golomb 1966, Gallager & van Voorhis 1975).
* ``ABSENT``: the same for the entries that do not travel; shorter over density 1/2.
* ``RUNS``: the same for the places where travelling starts and stops, after their count (u32); whole rows or layers
  cost next to nothing.

A Rice code with parameter r writes ``gap >> r`` in unary and the low r bits as they are. The two halves go to separate
streams, so that both directions are NumPy passes over whole arrays:

    u8 log2(block)  |  5 bits r for each block of gaps  |  low bits, grouped by r  |  unary: quotient zeros, then a one
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

MAX_LENGTH = 2**31 - 1
"""The longest vector whose indices can be coded: 8 GB of fp32."""

_LOG2_BLOCK = 8
"""How many gaps share one Rice parameter, as a power of 2. 256 follow changes from layer to layer, and the parameters
take under 1 % of the bits; 1024 take 10 % more where a dense factor alternates with a sparse one, 64 lose at 1/4."""

_RICE_BITS = 5  # gaps stay under 2^31, so no parameter goes over 30

Indices = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


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
        indices: integers, shape (k,), strictly increasing, each from 0 to n - 1.
        n: length of the vector they point into, from 0 to ``MAX_LENGTH``.

    Returns:
        The coding and its bytes. Equal sets give equal bytes.

    Raises:
        ValueError: ``n`` out of range, or ``indices`` not as described.
    """
    indices = _checked(indices, n)
    k = indices.size
    if k == n:
        return Coding.ALL, b""
    if k == 0:
        return Coding.NONE, b""
    breaks = np.flatnonzero(np.diff(indices) != 1)
    if 2 * breaks.size + 2 < min(k, n - k):
        boundaries = _boundaries(indices, breaks, n)
        best = Coding.RUNS, boundaries.size.to_bytes(4, "little") + _encode_gaps(boundaries)
    elif k <= n // 2:
        best = Coding.GAPS, _encode_gaps(indices)
    else:
        best = Coding.ABSENT, _encode_gaps(np.flatnonzero(~_mask(indices, n)))
    if len(best[1]) < (n + 7) // 8:
        return best
    return Coding.BITMAP, np.packbits(_mask(indices, n), bitorder="little").tobytes()


def decode_indices(coding: int, data: bytes | memoryview, n: int, k: int) -> Indices:
    """Reads back what ``encode_indices`` wrote.

    Args:
        coding: a ``Coding``, or its number.
        data: exactly the bytes of the index section.
        n: length of the vector, from 0 to ``MAX_LENGTH``.
        k: how many indices there are, from 0 to n.

    Returns:
        int64, shape (k,), strictly increasing, each from 0 to n - 1.

    Raises:
        ValueError: the bytes are not the coding of k indices below n (unknown coding, wrong length, index out of
            range, another count, padding bits set).
    """
    if not 0 <= k <= n <= MAX_LENGTH:
        raise ValueError(f"indices: {k} of {n} entries is impossible")
    raw = np.frombuffer(data, np.uint8)
    if coding in (Coding.ALL, Coding.NONE):
        if raw.size or k != (n if coding == Coding.ALL else 0):
            raise ValueError(f"indices: coding {Coding(coding).name} does not fit {k} of {n} entries, {raw.size} bytes")
        return np.arange(k)
    if coding == Coding.BITMAP:
        found = np.flatnonzero(_unpack_bits(raw, n))
    elif coding == Coding.GAPS:
        found = _decode_gaps(raw, k, n)
    elif coding == Coding.ABSENT:
        found = np.flatnonzero(~_mask(_decode_gaps(raw, n - k, n), n))
    elif coding == Coding.RUNS:
        found = _fill_runs(_decode_gaps(raw[4:], int.from_bytes(raw[:4].tobytes(), "little"), n), n, k)
    else:
        raise ValueError(f"indices: unknown coding {coding}")
    if found.size != k:
        raise ValueError(f"indices: {found.size} entries where {k} were announced")
    return found


def _checked(indices: Indices, n: int) -> Indices:
    indices = np.asarray(indices)
    if not 0 <= n <= MAX_LENGTH:
        raise ValueError(f"n: got {n}, but index coding takes vectors of 0 to {MAX_LENGTH} entries")
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"indices: got {indices.dtype} of shape {indices.shape}, but a flat integer array is needed")
    indices = indices.astype(np.int64, copy=False)
    if indices.size and (indices[0] < 0 or indices[-1] >= n or (indices[1:] <= indices[:-1]).any()):
        raise ValueError(f"indices: they must rise strictly and lie in 0 to {n - 1}")
    return indices


def _mask(indices: Indices, n: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(n, np.bool_)
    mask[indices] = True
    return mask


def _boundaries(indices: Indices, breaks: Indices, n: int) -> Indices:
    """Where travelling starts, stops, starts, ...; a stop at n goes unsaid. ``breaks``: the last member of each run."""
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


def _encode_gaps(positions: Indices) -> bytes:
    """Rice codes at least one strictly increasing position."""
    gaps = (np.diff(positions, prepend=-1) - 1).astype(np.uint32)
    starts, sizes = _blocks(gaps.size, _LOG2_BLOCK)
    rice = _best_rice(gaps, starts, sizes)
    widths = np.repeat(rice, sizes)
    parts = [bytes([_LOG2_BLOCK]), _pack(rice, _RICE_BITS)]
    for width in np.unique(rice):
        if width:
            parts.append(_pack(gaps[widths == width] & np.uint32((1 << int(width)) - 1), int(width)))
    ones = np.cumsum((gaps >> widths) + np.uint32(1), dtype=np.int64) - 1
    parts.append(np.packbits(_mask(ones, int(ones[-1]) + 1), bitorder="little").tobytes())
    return b"".join(parts)


def _decode_gaps(raw: Bytes, count: int, n: int) -> Indices:
    """The positions that ``_encode_gaps`` wrote: ``count`` of them, each below ``n``."""
    # Each gap takes a bit at least. Asking that first keeps a false count from claiming memory.
    if not 1 <= count <= 8 * raw.size or raw[0] > 31:
        raise ValueError(f"indices: {raw.size} bytes do not hold {count} gaps")
    starts, sizes = _blocks(count, int(raw[0]))
    at = 1 + (starts.size * _RICE_BITS + 7) // 8
    rice = _unpack(raw[1:at], starts.size, _RICE_BITS)
    widths = np.repeat(rice, sizes)
    gaps = np.zeros(count, np.int64)
    for width in np.unique(rice):
        if width:
            chosen = widths == width
            members = int(np.count_nonzero(chosen))
            end = at + (members * int(width) + 7) // 8
            gaps[chosen] = _unpack(raw[at:end], members, int(width))
            at = end
    ones = np.flatnonzero(_unpack_bits(raw[at:], 8 * raw[at:].size))
    if ones.size != count or (ones[-1] >> 3) + 1 != raw.size - at:
        raise ValueError(f"indices: the unary stream does not hold {count} gaps and nothing else")
    quotients = np.diff(ones, prepend=-1) - 1
    # Quotients are bounded before they are shifted: then no sum below can leave 64 bits.
    if (quotients > (n >> widths.astype(np.int64))).any():
        raise ValueError(f"indices: a gap beyond {n} entries")
    positions: Indices = np.cumsum((quotients << widths) + gaps + 1) - 1
    if positions[-1] >= n:
        raise ValueError(f"indices: index {positions[-1]} is beyond {n} entries")
    return positions


def _blocks(count: int, log2_block: int) -> tuple[Indices, Indices]:
    """Start and size of each block of gaps; the last may be short."""
    starts = np.arange(0, count, 1 << log2_block)
    return starts, np.diff(starts, append=count)


def _best_rice(gaps: npt.NDArray[np.uint32], starts: Indices, sizes: Indices) -> Bytes:
    """The parameter with the fewest bits for each block.

    One more low bit costs a bit per gap and saves ``(gap >> r) - (gap >> r + 1)``. The saving falls as r grows, so the
    best r is the first at which it no longer pays; the loop ends there, about log2(mean gap) passes.
    """
    rice = np.zeros(starts.size, np.uint8)
    unary = np.add.reduceat(gaps, starts, dtype=np.int64)
    pays = np.ones(starts.size, np.bool_)
    while True:
        gaps = gaps >> np.uint32(1)
        halved = np.add.reduceat(gaps, starts, dtype=np.int64)
        pays &= unary - halved > sizes
        if not pays.any():
            return rice
        rice += pays
        unary = halved


def _pack(values: npt.NDArray[np.unsignedinteger], width: int) -> bytes:
    """The low ``width`` bits of each value, one after the other, lowest bit first."""
    size = 1 if width <= 8 else 2 if width <= 16 else 4
    raw = values.astype(f"<u{size}").view(np.uint8)
    bits = np.unpackbits(raw, bitorder="little").reshape(values.size, 8 * size)[:, :width]
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack(raw: Bytes, count: int, width: int) -> npt.NDArray[np.unsignedinteger]:
    size = 1 if width <= 8 else 2 if width <= 16 else 4
    bits = np.zeros((count, 8 * size), np.uint8)
    bits[:, :width] = _unpack_bits(raw, count * width).reshape(count, width)
    return np.packbits(bits.reshape(-1), bitorder="little").view(f"<u{size}")


def _unpack_bits(raw: Bytes, bits: int) -> npt.NDArray[np.bool_]:
    """``bits`` bits that fill ``raw`` exactly; the padding of the last byte must be zero."""
    if raw.size != (bits + 7) // 8 or (bits % 8 and raw[-1] >> (bits % 8)):
        raise ValueError(f"indices: {raw.size} bytes are not {bits} bits with zero padding")
    return np.unpackbits(raw, count=bits, bitorder="little").view(np.bool_)
