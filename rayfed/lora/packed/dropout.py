"""Dropout without a generator: whether an entry is dropped is a hash of whose it is and of where it stands.

A token's key is made of its client's key for this step, of its row in the client's batch and of its place in the row; a
feature's key of its layer's name and its number. So the mask is the same on every device, with padding and without,
beside any neighbours, and when a layer is computed anew; nothing has to be drawn in order. A module that a model passes
through twice drops the same entries both times.

The hash mixes in 32 bits what the keys, each mixed in 64, bring: two multiplications and a shift an entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayfed import seeding

# Constants of the 32-bit finaliser "lowbias32" (Wellons 2018), as signed numbers; the second is below.
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


def token_keys(client: int, lengths: Sequence[int]) -> np.ndarray:
    """(sum of lengths,) int32: a key for every token of a client's batch, row by row.

    ``client`` is what `seeding.derive_seed` gave for this client, round and step: 63 bits; ``lengths`` are its rows' tokens.
    """
    counts = np.asarray(lengths, np.int64)
    ends = np.cumsum(counts)
    places = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    rows = _mixed(np.uint64(client) + np.arange(len(counts), dtype=np.uint64))
    return _upper(_mixed(np.repeat(rows, counts) + places.astype(np.uint64)))


def feature_keys(layer: str, width: int) -> Tensor:
    """(width,) int32: a key for every input feature of the layer of this name."""
    start = np.uint64(seeding.derive_seed(0, "dropout.features", layer))
    return torch.from_numpy(_upper(_mixed(start + np.arange(width, dtype=np.uint64))))


def dropped(x: Tensor, rate: float, tokens: Tensor, features_I: Tensor) -> Tensor:
    """Inverted dropout: each entry of ``x`` (..., I) is 0 with probability ``rate``, else divided by 1 - rate.

    ``tokens`` (..., 1) and ``features_I`` (I,) are int32 keys.
    """
    hashed = (tokens ^ features_I).mul_(FIRST)
    hashed.bitwise_xor_((hashed >> 15) & 0x1FFFF).mul_(SECOND)  # masked: the shift of a signed number copies its sign
    return x * (hashed >= round(rate * 2**32) - 2**31) / (1 - rate)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014): all bits of x in all bits of the result."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _upper(x: np.ndarray) -> np.ndarray:
    return (x >> np.uint64(32)).astype(np.uint32).view(np.int32)
