"""Counter-based dropout: whether an entry is dropped is a hash of (client key, token, feature).

No generator state is needed (counter-based generators: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"). The key of a token is made of the client's key for this step, the token's row in the client's batch and its
position in the row. The key of a feature is made of the layer's name and the feature's index. The mask is therefore the
same on every device, with and without padding, whatever other clients are in the pack, and when gradient checkpointing
computes a layer again. A module that a model calls twice in one step drops the same entries both times.

Keys are mixed in 64 bits. For each entry the two keys are then mixed in 32 bits: two multiplications and a shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayfed import seeding

# Constants of the 32-bit finaliser "lowbias32" (Wellons 2018), as signed numbers.
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


def token_keys(client_key: int, lengths: Sequence[int]) -> np.ndarray:
    """One int32 key for every token of a client's batch, row by row: shape (sum of lengths,).

    ``client_key`` has 63 bits and comes from `seeding.derive_seed` for this client, round and step. ``lengths`` are the
    tokens of each row.
    """
    counts = np.asarray(lengths, np.int64)
    ends = np.cumsum(counts)
    positions = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    rows = _mix(np.uint64(client_key) + np.arange(len(counts), dtype=np.uint64))
    return _upper_half(_mix(np.repeat(rows, counts) + positions.astype(np.uint64)))


def feature_keys(layer: str, width: int) -> Tensor:
    """One int32 key for every input feature of the layer with this name: shape (width,)."""
    start = np.uint64(seeding.derive_seed(0, "dropout.features", layer))
    return torch.from_numpy(_upper_half(_mix(start + np.arange(width, dtype=np.uint64))))


def hash_dropout(x: Tensor, rate: float, tokens: Tensor, features_I: Tensor) -> Tensor:
    """Inverted dropout: each entry of ``x`` is 0 with probability ``rate`` and otherwise divided by 1 - rate.

    Shapes: x and the result (..., I); int32 keys ``tokens`` (..., 1) and ``features_I`` (I,). ``rate`` is in [0, 1).
    """
    hashed = (tokens ^ features_I).mul_(FIRST)
    hashed.bitwise_xor_((hashed >> 15) & 0x1FFFF).mul_(SECOND)  # masked: the shift of a signed number copies its sign
    return x * (hashed >= round(rate * 2**32) - 2**31) / (1 - rate)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014): every bit of x affects every bit of the result."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _upper_half(x: np.ndarray) -> np.ndarray:
    return (x >> np.uint64(32)).astype(np.uint32).view(np.int32)
