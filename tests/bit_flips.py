"""Damaged bytes for the tests of codecs."""

from __future__ import annotations

import random
from collections.abc import Iterator


def flipped(data: bytes, most: int | None) -> Iterator[bytes]:
    """The data with one bit flipped: for ``most`` bits, drawn with a fixed seed, or (None) for every bit."""
    bits = range(8 * len(data))
    for bit in bits if most is None else random.Random(0).sample(bits, min(most, len(bits))):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        yield bytes(bad)
