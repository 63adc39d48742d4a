"""QSGD (Alistarh et al. 2017, arXiv 1610.02132): values rounded at random to few levels, so that the mean is exact.

With b bits a value there are s = 2^(b-1) - 1 levels on each side of 0. For every bucket of 256 values, with M the
largest magnitude among them:

    r = s |v| / M,   l = floor(r) + 1 with probability r - floor(r), else floor(r),   decoded: sign(v) M l / s

So every value is decoded without bias, with a variance of at most (M / s)^2 / 4. The squared error of a bucket of n
values has a mean of at most min(n / s^2, sqrt(n) / s) ||v||^2, as in the paper's Lemma 3.1. The paper proves that for
the L2 norm of a bucket in the place of M, and scales by the largest magnitude in its experiments: the bound holds for
both, as M <= ||v||, and the error is smaller. The probabilities are those of float32, to 2^-24.

The random numbers follow from a seed: equal values with equal seeds give equal bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BUCKET = 256
"""Values that share a largest magnitude."""
BITS = {f"qsgd{bits}": bits for bits in range(2, 9)}
"""Bits of a value by the name of the format."""


def qsgd_bytes(count: int, bits: int) -> int:
    """How many bytes ``count`` values take: a float32 for each bucket, and ``bits`` bits for each value."""
    return 4 * -(-count // BUCKET) + -(-count * bits // 8)


def encode_qsgd(x: npt.NDArray[np.float32], bits: int, seed: int) -> bytes:
    """The largest magnitudes of the buckets, then the codes l (or s + l for negative values), lowest bit first.

    ValueError where ``x`` (count,) has a NaN or an infinity.
    """
    levels = 2 ** (bits - 1) - 1
    padded = np.zeros((-(-len(x) // BUCKET), BUCKET), np.float32)
    padded.reshape(-1)[: len(x)] = np.abs(x)
    largest = padded.max(axis=1)
    if not np.isfinite(largest).all():
        raise ValueError(f"x: holds NaN or an infinity, which qsgd{bits} cannot write; use fp32, bf16 or fp16")
    # Dividing first keeps the ratio within [0, 1] for very small and very large buckets.
    padded /= np.where(largest == 0, np.float32(1), largest)[:, None]
    padded *= np.float32(levels)
    ratios = padded.reshape(-1)[: len(x)]
    lower = np.floor(ratios)
    draws = np.random.Generator(np.random.PCG64(seed)).random(len(x), np.float32)
    codes = (lower + (draws < ratios - lower)).astype(np.uint8)
    codes += np.where((x < 0) & (codes > 0), np.uint8(levels), np.uint8(0))
    each = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return largest.tobytes() + np.packbits(each, bitorder="little").tobytes()


def decode_qsgd(data: bytes | memoryview, count: int, bits: int) -> npt.NDArray[np.float32]:
    """Reads back what `encode_qsgd` wrote: (count,). ``data`` has the length that `qsgd_bytes` says."""
    levels, buckets = 2 ** (bits - 1) - 1, -(-count // BUCKET)
    largest = np.frombuffer(data, np.float32, buckets)
    packed = np.frombuffer(data, np.uint8, offset=4 * buckets)
    each = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    codes = np.packbits(each, axis=1, bitorder="little").reshape(count).astype(np.int16)
    signed = np.where(codes > levels, levels - codes, codes)
    padded = np.zeros((buckets, BUCKET), np.float32)
    padded.reshape(-1)[:count] = signed
    padded /= np.float32(levels)
    padded *= largest[:, None]
    return padded.reshape(-1)[:count].copy()
