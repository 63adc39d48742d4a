"""The Rice code in whole-array passes: its parameters are the best, its bits are where they belong."""

import hashlib

import numpy as np
import pytest

from rayfed.wire import rice
from rayfed.wire.indices import encode_indices
from rayfed.wire.rice import decode_gaps, encode_gaps


def bits_of(values: np.ndarray, width: int) -> bytes:
    """The values one after the other, lowest bit first, as one large integer: the definition."""
    whole = sum(int(value) << (i * width) for i, value in enumerate(values))
    return whole.to_bytes((len(values) * width + 7) // 8, "little")


@pytest.mark.parametrize("count", [1, 7, 8, 9, rice._MANY - 1, rice._MANY, rice._MANY + 5])
@pytest.mark.parametrize("width", [1, 3, 5, 8, 9, 16, 17, 30])
def test_packed_bits_are_the_definition(count, width):
    values = np.random.default_rng(count).integers(0, 2**width, count).astype(np.uint32)
    packed = rice._pack(values, width)
    assert packed == bits_of(values, width)
    np.testing.assert_array_equal(rice._unpack(np.frombuffer(packed, np.uint8), count, width), values)


@pytest.mark.parametrize("width", [3, 17])
@pytest.mark.parametrize("count", [9, rice._MANY + 1])
def test_padding_bits_must_be_zero(count, width):
    packed = np.frombuffer(rice._pack(np.zeros(count, np.uint32), width), np.uint8).copy()
    packed[-1] |= 0x80
    with pytest.raises(ValueError, match="zero padding"):
        rice._unpack(packed, count, width)


@pytest.mark.parametrize("mean", [0, 0.3, 1, 2.9, 3, 6, 15, 200, 1e5])
def test_every_block_has_its_best_parameter(mean):
    """The search, which skips parameters, finds the same one as trying all of them."""
    rng = np.random.default_rng(1)
    gaps = rng.geometric(1 / (1 + mean * rng.choice([1, 1, 4], 2000))) - 1
    blocks = rice._in_blocks(gaps, 256)
    sizes = np.minimum(256, gaps.size - 256 * np.arange(len(blocks)))
    costs = np.stack([sizes * (1 + r) + (blocks.astype(np.int64) >> r).sum(1) for r in range(31)])
    np.testing.assert_array_equal(rice._best_rice(blocks, sizes), costs.argmin(0))


@pytest.mark.parametrize("log2_block", [0, 3, 31])
def test_blocks_of_any_size_are_read(monkeypatch, log2_block):
    """A payload says how long its blocks are."""
    monkeypatch.setattr(rice, "_LOG2_BLOCK", log2_block)
    gaps = np.random.default_rng(0).geometric(0.1, 500).astype(np.uint32)
    positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    data = np.frombuffer(encode_gaps(gaps), np.uint8)
    np.testing.assert_array_equal(decode_gaps(data, gaps.size, int(positions[-1]) + 1), positions)
    with pytest.raises(ValueError, match="beyond"):
        decode_gaps(data, gaps.size, int(positions[-1]))


def test_the_bytes_of_format_version_1_stay_what_they_are():
    """Old payloads must stay readable, and the byte counts of a run must not change."""
    draw = np.random.default_rng(5).random(20_000)
    digest = hashlib.sha256()
    for density in (1 / 64, 1 / 16, 1 / 4, 0.8):
        for scale in (1.0, np.repeat([1.0, 0.1, 0.0, 0.6], 5000)):
            coding, data = encode_indices(np.flatnonzero(draw < density * scale), 20_000)
            digest.update(bytes([coding]) + data)
    assert digest.hexdigest() == "3158622f349142c54bdb7c7e599225b2ab2d9b7960c3b120a9a8415b05552477"
