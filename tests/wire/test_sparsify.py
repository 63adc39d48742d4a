import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayfed.wire import keep_count, top_k, top_mask


def brute_force(x: torch.Tensor, k: int) -> list[int]:
    """The definition, by a full sort: larger magnitude first, then lower index."""
    magnitudes = [abs(v) for v in x.tolist()]
    ranked = sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))
    return sorted(ranked[:k])


# Few distinct magnitudes, so that ties, zeros of both signs and subnormals are the rule and not the exception.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.5, 1e-45, -1e-45, 3.4e38])


@given(st.lists(st.one_of(TIED, st.floats(width=32, allow_nan=False, allow_infinity=False)), max_size=60), st.data())
def test_top_k_is_the_definition(values, data):
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(0, len(values) + 2))
    kept = top_k(x, k)
    assert kept.dtype == torch.int64
    assert kept.tolist() == brute_force(x, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_top_k_on_long_vectors_with_zeros(dtype, share):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3000, generator=g).to(dtype)
    x[torch.rand(3000, generator=g) < share] = 0
    before = x.clone()
    for k in (0, 1, 150, 1499, 2999, 3000, 4000):
        assert top_k(x, k).tolist() == brute_force(x, k)
    assert torch.equal(x, before)


def test_top_k_takes_views_and_leaves():
    x = torch.arange(20.0, requires_grad=True)
    assert top_k(x[::2], 3).tolist() == [7, 8, 9]
    assert top_k(torch.zeros(5), 2).tolist() == [0, 1]
    assert top_k(torch.empty(0), 0).tolist() == top_k(torch.empty(0), 3).tolist() == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [0, 2, 100])
def test_top_k_refuses_what_has_no_order(bad, k):
    x = torch.ones(100)
    x[57] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        top_k(x, k)


def test_keep_count_is_the_float_product_of_the_paper():
    assert keep_count(100, 0.29) == 28  # 0.29 * 100 is 28.999999999999996
    assert keep_count(600_000, 1 / 64) == 9375
    assert keep_count(7, 1) == 7


def test_at_least_one_entry_travels():
    assert keep_count(3, 0.25) == keep_count(3, 0.0) == keep_count(1, 5e-324) == 1
    assert keep_count(0, 0.5) == 0


@given(st.integers(0, 10**9), st.floats(0, 1, exclude_min=True))
def test_keep_count_stays_in_range(n, density):
    assert min(n, 1) <= keep_count(n, density) <= n


@given(st.integers(0, 300), st.floats(0.01, 1), st.integers(0, 1000))
def test_entries_that_travel_whole_do_not_count(n, density, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    whole = torch.arange(n) % 3 == 0
    mask = top_mask(x, density, whole)
    assert bool(mask[whole].all())
    assert torch.equal(mask[~whole], top_mask(x[~whole], density))


@given(st.integers(0, 300), st.floats(0.01, 1), st.integers(0, 1000))
def test_top_mask_agrees_with_top_k(n, density, seed):
    x = torch.from_numpy(np.random.default_rng(seed).integers(-4, 5, n).astype(np.float32))
    mask = top_mask(x, density)
    assert mask.dtype == torch.bool
    assert mask.shape == x.shape
    assert mask.nonzero().flatten().tolist() == top_k(x, keep_count(n, density)).tolist()


@pytest.mark.parametrize("k", [100, 2500, 9_000, 12_000, 30_000])
@pytest.mark.parametrize("largest_at", [slice(0, None, 5), slice(1, None, 5), slice(0, 10_000), slice(0, 0)])
def test_top_k_does_not_depend_on_the_sample_that_it_begins_with(largest_at, k):
    """The sample is every fifth of 50,000 entries. Here all of these are among the largest, or none."""
    x = np.random.default_rng(2).standard_normal(50_000).astype(np.float32).round(1)
    x[largest_at] *= 100
    definition = np.lexsort([np.arange(x.size), -np.abs(x)])[:k]
    assert top_k(torch.from_numpy(x), k).tolist() == np.sort(definition).tolist()
