"""Which entries of a flat vector travel: the largest ones, by magnitude.

Promises: ``top_k`` keeps exactly ``k`` entries, the same ones on every machine, device and thread count. Equal
magnitudes are broken by the lowest index, so the choice is a function of the values alone. Every order of kept and
dropped entries agrees: no dropped magnitude exceeds a kept one. NaN and infinities are refused rather than ranked.

FLASC (arXiv 2406.05233, algorithm 1) applies this once to the whole flat vector of trainable parameters, downlink and
uplink alike; ``keep_count`` is the count its published code uses.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLE = 10_000  # entries that are looked at for a first guess of the threshold

Integers = npt.NDArray[np.signedinteger]


def keep_count(n: int, density: float) -> int:
    """How many of ``n`` entries travel at ``density``: ``floor(density * n)``, the product taken in floats.

    The float product is that of the paper's code, so 0.29 of 100 entries is 28 of them, not 29.

    Args:
        n: length of the vector, at least 0.
        density: share of entries that travel, over 0 and at most 1.

    Returns:
        A count from 0 to ``n``. A density under ``1 / n`` gives 0: nothing travels.

    Raises:
        ValueError: ``n`` or ``density`` out of range, NaN included.
    """
    if n < 0:
        raise ValueError(f"n: got {n}, but a vector has 0 entries or more")
    if not 0 < density <= 1:
        raise ValueError(f"density: got {density!r}, but it must be over 0 and at most 1")
    return math.floor(density * n)


def top_k(x: Tensor, k: int) -> Tensor:
    """The indices of the ``k`` largest magnitudes of a flat vector, in ascending order.

    Ties go to the lowest index; ``-0.0`` and ``0.0`` tie. The threshold is found by selection, O(n), not by a sort:
    a sample bounds it from below, and only what reaches that bound is looked at closely.

    Args:
        x: shape (n,), any real floating dtype, any device. Not changed.
        k: at least 0; more than ``n`` means all.

    Returns:
        int64 indices, shape (min(k, n),), strictly increasing, on the device of ``x``.

    Raises:
        ValueError: ``x`` is not flat or not floating, holds NaN or an infinity, or ``k`` is negative.
    """
    if x.ndim != 1 or not x.dtype.is_floating_point or x.element_size() not in _AS_INTEGERS:
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, but top_k takes a flat floating vector")
    if k < 0:
        raise ValueError(f"k: got {k}, but it must be 0 or more")
    n = x.numel()
    # IEEE magnitudes order as their bit patterns do, infinities and NaN last, and integers are selected faster.
    integer = _AS_INTEGERS[x.element_size()]
    bits = (x.detach().cpu().contiguous().view(integer) & torch.iinfo(integer).max).numpy()
    if n and bits.max() >= torch.tensor(torch.inf, dtype=x.dtype).view(integer).item():
        raise ValueError("x: holds NaN or an infinity, and magnitudes with one have no order")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    if k >= n:
        return torch.arange(n, device=x.device)
    return torch.from_numpy(_largest(bits, k).astype(np.int64, copy=False)).to(x.device)


def top_mask(x: Tensor, density: float) -> Tensor:
    """A mask of the ``keep_count(n, density)`` largest magnitudes of a flat vector; ties as in ``top_k``.

    Args:
        x: shape (n,), any real floating dtype, any device.
        density: share of entries to keep, over 0 and at most 1.

    Returns:
        bool, shape (n,), on the device of ``x``; True where the entry travels.

    Raises:
        ValueError: as ``keep_count`` and ``top_k``.
    """
    mask = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    mask[top_k(x, keep_count(x.numel(), density))] = True
    return mask


def _largest(bits: Integers, k: int) -> npt.NDArray[np.intp]:
    """Where the k largest of non-negative integers stand, 1 <= k < len(bits): ascending, ties to the lowest index."""
    # A lower bound from a sample leaves little more than k to select from. It may turn out too high; 1 never does.
    bound = _lower_bound(bits, k)
    candidates = np.flatnonzero(bits >= bound)
    if candidates.size < k and bound > 1:
        candidates = np.flatnonzero(bits >= 1)
    if candidates.size < k:
        zeros = np.flatnonzero(bits == 0)[: k - candidates.size]
        return np.sort(np.concatenate([candidates, zeros]), kind="stable")
    found = bits[candidates]
    threshold = np.partition(found, found.size - k)[found.size - k]
    kept = found > threshold
    kept[np.flatnonzero(found == threshold)[: k - np.count_nonzero(kept)]] = True
    return candidates[kept]


def _lower_bound(bits: Integers, k: int) -> int:
    """At least 1, and most likely a little below the k-th largest; which entries are kept never depends on it."""
    sample = bits[:: max(bits.size // _SAMPLE, 1) | 1]  # an odd stride: rows of a factor have an even length
    expected = sample.size * k / bits.size
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)  # four standard deviations of the count
    # Untrained B factors and sparse changes are mostly zeros, and selection among so many ties is 40 times slower.
    sample = sample[sample != 0]
    return 1 if rank > sample.size else int(np.partition(sample, sample.size - rank)[sample.size - rank])
