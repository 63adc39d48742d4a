import math

import numpy as np
import pytest
from bit_flips import flipped
from hypothesis import given
from hypothesis import strategies as st

from rayfed.wire.indices import MAX_LENGTH, Coding, decode_indices, encode_indices


def entropy_bytes(n: int, density: float) -> float:
    if density in (0, 1):
        return 0.0
    return n * -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8


def random_set(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(n, k, replace=False)).astype(np.int64)


def round_trip(indices: np.ndarray, n: int) -> tuple[Coding, bytes]:
    coding, data = encode_indices(indices, n)
    back = np.arange(n) if coding is Coding.ALL else decode_indices(coding, data, n, indices.size)
    assert back.dtype == np.int64
    np.testing.assert_array_equal(back, indices)
    assert (coding, data) == encode_indices(indices.copy(), n)
    return coding, data


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_round_trip_of_random_sets(n, density, seed):
    round_trip(np.flatnonzero(np.random.default_rng(seed).random(n) < density), n)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0])), max_size=12),
    st.integers(0, 99),
)
def test_round_trip_of_uneven_sets(regions, seed):
    rng = np.random.default_rng(seed)
    member = np.concatenate([np.zeros(0, bool), *(rng.random(size) < density for size, density in regions)])
    round_trip(np.flatnonzero(member), member.size)


@given(st.sets(st.integers(0, 40)), st.integers(41, 44))
def test_round_trip_of_tiny_sets(members, n):
    round_trip(np.array(sorted(members), np.int64), n)


@given(st.sets(st.integers(0, MAX_LENGTH - 1), min_size=1, max_size=50))
def test_round_trip_over_the_longest_vector(members):
    round_trip(np.array(sorted(members), np.int64), MAX_LENGTH)


def test_every_coding_has_its_case():
    assert round_trip(np.arange(100), 100) == (Coding.ALL, b"")
    assert round_trip(np.arange(0), 0) == (Coding.ALL, b"")
    assert round_trip(np.arange(0), 100) == (Coding.NONE, b"")
    assert round_trip(random_set(5000, 2500), 5000)[0] is Coding.BITMAP
    assert round_trip(random_set(5000, 500), 5000)[0] is Coding.GAPS
    assert round_trip(random_set(5000, 4500), 5000)[0] is Coding.ABSENT
    assert round_trip(np.r_[700:900, 2000:2600], 5000)[0] is Coding.RUNS
    assert round_trip(np.r_[700:900, 2000:5000], 5000)[0] is Coding.RUNS  # the last run ends with the vector
    assert round_trip(np.r_[0:900], 5000)[0] is Coding.RUNS


@pytest.mark.parametrize("density", [1 / 4, 1 / 16, 1 / 64, 1 / 256])
def test_random_sets_stay_within_2_percent_of_the_entropy(density):
    n = 600_000
    for seed in range(2):
        _, data = round_trip(random_set(n, int(n * density), seed), n)
        assert entropy_bytes(n, density) * 0.99 < len(data) < entropy_bytes(n, density) * 1.02


def test_no_density_is_far_from_the_entropy():
    n = 400_000
    for density in [*np.geomspace(1e-3, 0.5, 25), 0.38, 0.6, 0.8, 0.95, 0.995]:
        k = int(n * density)
        _, data = encode_indices(random_set(n, k), n)
        assert len(data) < entropy_bytes(n, k / n) * 1.05 + 8, density


def test_uneven_density_costs_less_than_the_entropy_of_the_mean():
    rng = np.random.default_rng(0)
    density = np.repeat([0.6, 0.002, 0.1, 0.01, 0.3, 0.002], 100_000)
    indices = np.flatnonzero(rng.random(density.size) < density)
    _, data = round_trip(indices, density.size)
    assert len(data) < 0.85 * entropy_bytes(density.size, indices.size / density.size)
    # and stays near the bound that knows each region's density
    assert len(data) < 1.05 * sum(entropy_bytes(100_000, d) for d in density[::100_000])


def test_whole_rows_cost_next_to_nothing():
    n, row = 600_000, 768
    rows = random_set(n // row, 200)
    _, data = round_trip((rows[:, None] * row + np.arange(row)).reshape(-1), n)
    assert len(data) < 600  # 153,600 entries


@pytest.mark.parametrize(
    "indices",
    [
        np.array([3, 2]),
        np.array([2, 2]),
        np.array([-1, 2]),
        np.array([2, 10]),
    ],
)
def test_encode_refuses_what_is_no_set(indices):
    with pytest.raises(ValueError, match="indices"):
        encode_indices(indices, 10)


def decoded_set(coding: Coding, data: bytes, n: int, k: int) -> np.ndarray | None:
    """k indices below n, or None if the bytes are refused. Any other result or exception is a failure."""
    try:
        got = decode_indices(coding, data, n, k)
    except ValueError:
        return None
    assert got.size == k
    assert got[0] >= 0
    assert got[-1] < n
    assert (np.diff(got) > 0).all()
    return got


SETS = {
    Coding.BITMAP: (random_set(301, 150), 301),
    Coding.GAPS: (random_set(3000, 150), 3000),
    Coding.ABSENT: (random_set(3000, 2850), 3000),
    Coding.RUNS: (np.r_[7:90, 200:280, 290:400], 3001),
}


@pytest.mark.parametrize("coding", SETS)
def test_decode_refuses_other_lengths_and_counts(coding):
    indices, n = SETS[coding]
    got, data = round_trip(indices, n)
    assert got is coding
    k = indices.size
    for cut in range(len(data)):
        with pytest.raises(ValueError, match="indices"):
            decode_indices(coding, data[:cut], n, k)
    for extra in (b"\0", b"\1", b"\xff" * 9):
        with pytest.raises(ValueError, match="indices"):
            decode_indices(coding, data + extra, n, k)
    for other in (k - 1, k + 1):
        with pytest.raises(ValueError, match="indices"):
            decode_indices(coding, data, n, other)
    with pytest.raises(ValueError, match="indices"):
        decode_indices(coding, data, int(indices[-1]), k)  # the last index is now out of range
    with pytest.raises(ValueError, match="indices"):
        decode_indices(6, data, n, k)


@pytest.mark.parametrize("most", [256, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("coding", SETS)
def test_a_flipped_bit_gives_another_set_or_is_refused(coding, most):
    """No bit is ignored, padding included. Only another block size may give the same set, if the set fits one block."""
    indices, n = SETS[coding]
    _, data = encode_indices(indices, n)
    block_at = {Coding.GAPS: 0, Coding.ABSENT: 0, Coding.RUNS: 4}.get(coding)
    for bad in flipped(data, most):
        got = decoded_set(coding, bad, n, indices.size)
        block_size_changed = block_at is not None and bad[block_at] != data[block_at]
        assert got is None or block_size_changed or not np.array_equal(got, indices)


@pytest.mark.parametrize("coding", SETS)
def test_noise_gives_a_set_or_is_refused(coding):
    indices, n = SETS[coding]
    _, data = encode_indices(indices, n)
    rng = np.random.default_rng(0)
    noise = [rng.bytes(int(size)) for size in rng.integers(0, 2 * len(data), 100)]
    noise += [data[:5] + rng.bytes(len(data) - 5) for _ in range(100)]
    refused = [decoded_set(coding, bad, n, indices.size) is None for bad in noise]
    assert sum(refused) > len(noise) // 2
