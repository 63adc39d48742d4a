"""Which entries of a flat vector travel: the largest ones, by magnitude.

``top_k`` selects exactly ``k`` entries, the same ones on every machine, device and thread count. Of equal magnitudes
the one with the lowest index is selected first, so the choice is a function of the values alone. NaN and infinities are
refused, because they have no order.

FLASC (arXiv 2406.05233, algorithm 1) applies ``top_k`` to the whole flat vector of trainable parameters, for both
downlink and uplink. ``keep_count`` is the count in its published code, but at least one entry.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLE = 10_000  # size of the sample from which a first threshold is estimated

Integers = npt.NDArray[np.signedinteger]


def keep_count(n: int, density: float) -> int:
    """How many of ``n`` entries travel at ``density``: ``floor(density * n)``, and at least one.

    The product is computed in floating point, as in the paper's code: 0.29 of 100 entries are 28, not 29. So a density
    that decays never ends the exchange: under ``1 / n``, one entry travels.

    Args:
        n: length of the vector, at least 0.
        density: share of entries that travel, over 0 and at most 1.

    Returns:
        A count from 1 to ``n``; 0 for an empty vector.
    """
    return max(math.floor(density * n), min(n, 1))


def top_k(x: Tensor, k: int) -> Tensor:
    """The indices of the ``k`` largest magnitudes of a flat vector, in ascending order.

    Of equal magnitudes the lowest index comes first; ``-0.0`` and ``0.0`` are equal. The threshold is found in O(n) by
    selection, not by a sort: a sample gives a lower bound, and only entries from that bound on are compared further.

    Args:
        x: shape (n,), any real floating dtype, any device. Not changed.
        k: at least 0; more than ``n`` means all.

    Returns:
        int64 indices, shape (min(k, n),), strictly increasing, on the device of ``x``.

    Raises:
        ValueError: ``x`` has a NaN or an infinity.
    """
    n = x.numel()
    # IEEE magnitudes have the order of their bit patterns, infinities and NaN last. Selection is faster on integers.
    integer = _AS_INTEGERS[x.element_size()]
    bits = (x.detach().cpu().contiguous().view(integer) & torch.iinfo(integer).max).numpy()
    if n and bits.max() >= torch.tensor(torch.inf, dtype=x.dtype).view(integer).item():
        raise ValueError("x: holds NaN or an infinity, and magnitudes with one have no order")
    if k == 0 or k >= n:
        return torch.arange(min(k, n), device=x.device)
    return torch.from_numpy(_largest(bits, k).astype(np.int64, copy=False)).to(x.device)


def top_mask(x: Tensor, density: float, whole: Tensor | None = None) -> Tensor:
    """A mask of the ``keep_count(n, density)`` largest magnitudes of a flat vector; ties as in ``top_k``.

    Args:
        x: shape (n,), any real floating dtype, any device.
        density: share of entries to keep, over 0 and at most 1.
        whole: bool, shape (n,): entries that travel in any case. The density is that of the others. None: no entry.

    Returns:
        bool, shape (n,), on the device of ``x``; True where the entry travels.

    Raises:
        ValueError: as ``top_k``.
    """
    if whole is not None:
        mask = whole.clone()
        mask[~whole] = top_mask(x[~whole], density)
        return mask
    mask = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    mask[top_k(x, keep_count(x.numel(), density))] = True
    return mask


def _largest(bits: Integers, k: int) -> npt.NDArray[np.intp]:
    """The indices of the k largest of non-negative integers, ascending; 1 <= k < len(bits). Ties: the lowest index."""
    # A lower bound from a sample leaves little more than k candidates. It may be too high; then 1 is the bound.
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
    """A bound of at least 1, probably a little below the k-th largest. The result of `_largest` never depends on it."""
    # The stride is odd, because an even one would meet the same columns of a factor again and again.
    sample = bits[:: max(bits.size // _SAMPLE, 1) | 1]
    expected = sample.size * k / bits.size
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)  # four standard deviations of the count
    # Untrained B factors and sparse changes are mostly zeros. Selection among so many ties is 40 times slower.
    sample = sample[sample != 0]
    return 1 if rank > sample.size else int(np.partition(sample, sample.size - rank)[sample.size - rank])
