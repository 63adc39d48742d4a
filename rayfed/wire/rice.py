"""Rice codes of gaps (Rice & Plaunt 1971), in NumPy passes over whole arrays.

A Rice code with parameter r writes ``gap >> r`` in unary and the low r bits as they are. It is near optimal for the
geometric gaps of a random set (Golomb 1966, Gallager & van Voorhis 1975). Each block of gaps has its own parameter. Low
bits and unary parts are separate streams:

    u8 log2(block)  |  5 bits r for each block of gaps  |  low bits, grouped by r  |  unary: quotient zeros, then a one

Equal gaps give equal bytes. Bytes that are not the code of ``count`` gaps below n are refused.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_LOG2_BLOCK = 8
"""log2 of the number of gaps that share one Rice parameter. With 256 gaps the parameters take under 1 % of the bits.
1024 gaps would take 10 % more bits where dense and sparse factors alternate; 64 gaps would take more at density 1/4."""

_RICE_BITS = 5  # gaps are below 2^31, so parameters are at most 30

Bytes = npt.NDArray[np.uint8]
Gaps = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.integer]


def encode_gaps(gaps: Gaps) -> bytes:
    """Codes one or more gaps (count,). The gaps and one entry after each must fit a vector of 2^31 - 1 entries."""
    size = min(1 << _LOG2_BLOCK, gaps.size)
    blocks = _in_blocks(gaps, size)
    rice = _best_rice(blocks, np.minimum(size, gaps.size - size * np.arange(len(blocks))))
    parts = [bytes([_LOG2_BLOCK]), _pack(rice, _RICE_BITS)]
    for width in _widths(rice):
        chosen = rice == width
        low = blocks[chosen].reshape(-1)
        if chosen[-1]:  # the last block may be short
            low = low[: low.size - (blocks.size - gaps.size)]
        parts.append(_pack(low & np.uint32((1 << width) - 1), width))
    steps = (blocks >> rice[:, None]).reshape(-1)[: gaps.size]
    steps[1:] += 1
    ones = _running_sum(steps)
    unary = np.zeros(int(ones[-1]) + 1, np.bool_)
    unary[ones] = True
    parts.append(np.packbits(unary, bitorder="little").tobytes())
    return b"".join(parts)


def decode_gaps(raw: Bytes, count: int, n: int) -> npt.NDArray[np.int64]:
    """The positions (count,) in a vector of ``n`` entries that have these gaps before them. ValueError if damaged."""
    # Each gap takes at least one bit. This check comes first, so that a false count cannot allocate memory.
    if not 1 <= count <= 8 * raw.size or raw[0] > 31:
        raise ValueError(f"indices: {raw.size} bytes do not hold {count} gaps")
    size = min(1 << int(raw[0]), count)
    blocks = -(-count // size)
    sizes = np.full(blocks, size)
    sizes[-1] = count - (blocks - 1) * size  # the last may be short
    at = 1 + (blocks * _RICE_BITS + 7) // 8
    rice = _unpack(raw[1:at], blocks, _RICE_BITS).astype(np.uint32)
    low = np.zeros((blocks, size), np.uint32)
    for width in _widths(rice):
        chosen = rice == width
        members = int(sizes[chosen].sum())
        end = at + (members * width + 7) // 8
        low[chosen] = _in_blocks(_unpack(raw[at:end], members, width), size)
        at = end
    ones = np.flatnonzero(unpack_bits(raw[at:], 8 * raw[at:].size))
    if ones.size != count or (ones[-1] >> 3) + 1 != raw.size - at:
        raise ValueError(f"indices: the unary stream does not hold {count} gaps and nothing else")
    quotients = np.append(ones[size - 1 : -1 : size], ones[-1]) - sizes  # summed over each block
    quotients[1:] -= ones[size - 1 : -1 : size]
    quotients[0] += 1
    # These checks exclude overflow below: with them, sums fit 64 bits and single values fit 32.
    if (quotients > (n >> rice.astype(np.int64))).any():
        raise ValueError(f"indices: a gap beyond {n} entries")
    last = int((quotients << rice).sum()) + int(low.sum(dtype=np.int64)) + count - 1
    if last >= n:
        raise ValueError(f"indices: index {last} is beyond {n} entries")
    steps = np.zeros((blocks, size), np.uint32)
    flat, narrow = steps.reshape(-1), ones.astype(np.uint32)
    flat[0] = narrow[0]
    np.subtract(narrow[1:], narrow[:-1], out=flat[1:count])
    flat[1:count] -= 1
    steps <<= rice[:, None]
    steps += low
    flat[1:count] += 1
    return _running_sum(flat[:count])


def unpack_bits(raw: Bytes, bits: int) -> npt.NDArray[np.bool_]:
    """The ``bits`` bits of ``raw`` as booleans (bits,), lowest first. ValueError for another length or set padding."""
    _check_padding(raw, bits)
    return np.unpackbits(raw, count=bits, bitorder="little").view(np.bool_)


def _best_rice(blocks: Gaps, sizes: npt.NDArray[np.int64]) -> Bytes:
    """The parameter with the fewest bits for each block (row) of ``sizes`` gaps. The rest of a row is zeros.

    One more low bit costs one bit per gap and saves ``U(r) - U(r + 1)``, where ``U(r) = sum(gap >> r)``. The saving
    falls as r grows, so the best r is the first one at which the saving is no larger than the cost. The saving is at
    least U(r) / 2, and U(r) is more than ``sum(gap) / 2^r - size``. So r can grow while ``3 size 2^r <= sum(gap)``, and
    the search begins after that.
    """
    sums = np.add.reduce(blocks, axis=1, dtype=np.uint32)  # below 2^31
    begin = int((sums // (3 * sizes)).min()).bit_length()
    rice = np.full(len(blocks), begin, np.uint8)
    shifted = blocks >> np.uint32(begin)
    unary = np.add.reduce(shifted, axis=1, dtype=np.uint32).astype(np.int64)
    pays = np.ones(len(blocks), np.bool_)
    while True:
        shifted >>= np.uint32(1)
        halved = np.add.reduce(shifted, axis=1, dtype=np.uint32).astype(np.int64)
        pays &= unary - halved > sizes
        if not pays.any():
            return rice
        rice += pays
        unary = halved


def _running_sum(steps: Gaps) -> npt.NDArray[np.int64]:
    """Cumulative sums, all below 2^31. Torch takes half of the time of NumPy."""
    return torch.from_numpy(steps.view(np.int32)).cumsum(0, dtype=torch.int64).numpy()


def _widths(rice: Integers) -> list[int]:
    """The parameters over 0 that occur, smallest first."""
    return [width for width in np.flatnonzero(np.bincount(rice)).tolist() if width]


def _in_blocks(values: Integers, size: int) -> Gaps:
    """The values as rows of ``size``, the last one filled up with zeros. A copy."""
    blocks = np.zeros((-(-values.size // size), size), np.uint32)
    blocks.reshape(-1)[: values.size] = values
    return blocks


_DOUBLES = ("<u2", "<u4", "<u8")
_MANY = 1000  # from this number of values on, joining values in words is faster


def _pack(values: Integers, width: int) -> bytes:
    """Packs values of ``width`` bits (at most 31) one after the other, lowest bit first."""
    if width > 8 or values.size < _MANY:
        bits = np.unpackbits(values.astype("<u4").view(np.uint8), bitorder="little").reshape(values.size, 32)
        return np.packbits(bits[:, :width], bitorder="little").tobytes()
    # Eight values fill `width` bytes. Values are joined to pairs, pairs to fours, fours to a word of eight.
    words: Integers = np.zeros(-(-values.size // 8) * 8, np.uint8)
    words[: values.size] = values
    for joined, double in enumerate(_DOUBLES):
        half, used = 8 << joined, width << joined
        words = words.view(double)
        high = words >> half
        high <<= used
        words &= (1 << half) - 1
        words |= high
    eights = words.view(np.uint8).reshape(-1, 8)
    packed = np.empty((len(eights), width), np.uint8)
    for byte in range(width):  # few long copies are faster than many short ones
        packed[:, byte] = eights[:, byte]
    return packed.tobytes()[: (values.size * width + 7) // 8]


def _unpack(raw: Bytes, count: int, width: int) -> Integers:
    """The inverse of `_pack`."""
    _check_padding(raw, count * width)
    if width > 8 or count < _MANY:
        bits = np.zeros((count, 32), np.uint8)
        bits[:, :width] = np.unpackbits(raw, count=count * width, bitorder="little").reshape(count, width)
        return np.packbits(bits.reshape(-1), bitorder="little").view("<u4")
    eights = -(-count // 8)
    filled = np.zeros(eights * width, np.uint8)
    filled[: raw.size] = raw
    words = np.zeros((eights, 8), np.uint8)
    for byte in range(width):
        words[:, byte] = filled[byte::width]
    parts: Integers = words.reshape(-1)
    for joined, double in reversed(list(enumerate(_DOUBLES))):
        half, used = 8 << joined, width << joined
        parts = parts.view(double)
        high = parts >> used
        high <<= half
        parts &= (1 << used) - 1
        parts |= high
    return parts.view(np.uint8)[:count]


def _check_padding(raw: Bytes, bits: int) -> None:
    if raw.size != (bits + 7) // 8 or (bits % 8 and raw[-1] >> (bits % 8)):
        raise ValueError(f"indices: {raw.size} bytes are not {bits} bits with zero padding")
