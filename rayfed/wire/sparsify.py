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

    Ties go to the lowest index; ``-0.0`` and ``0.0`` tie. The threshold is found by selection, O(n), not by a sort.

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
    magnitude = x.detach().abs()
    # max() passes a NaN on, so one look at it covers every entry.
    if n and not torch.isfinite(magnitude.max()):
        raise ValueError("x: holds NaN or an infinity, and magnitudes with one have no order")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    if k >= n:
        return torch.arange(n, device=x.device)
    # IEEE magnitudes order as their bit patterns do, and integers are selected faster than floats.
    bits = magnitude.cpu().contiguous().view(_AS_INTEGERS[x.element_size()]).numpy()
    threshold = _kth_largest(bits, k)
    above = np.flatnonzero(bits > threshold)
    if above.size < k:
        tied = np.flatnonzero(bits == threshold)[: k - above.size]
        above = np.concatenate([above, tied])
        above.sort()
    return torch.from_numpy(above.astype(np.int64, copy=False)).to(x.device)


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


def _kth_largest(bits: npt.NDArray[np.signedinteger], k: int) -> np.signedinteger:
    """The k-th largest of non-negative integers, 1 <= k < len(bits)."""
    # Untrained B factors and sparse deltas are mostly zeros, and selection among so many ties is 40 times slower.
    some = np.count_nonzero(bits)
    if some < k:
        return bits.dtype.type(0)
    if some < bits.size:
        bits = bits[bits != 0]
    threshold: np.signedinteger = np.partition(bits, bits.size - k)[bits.size - k]
    return threshold
