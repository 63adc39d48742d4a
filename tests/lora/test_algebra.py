from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayfed.errors import RunError
from rayfed.lora import algebra
from rayfed.lora.adapter import LowRank

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair_of(
    out: int, inner: int, rank: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> LowRank:
    return LowRank(
        gaussian(out, rank, seed=seed, dtype=dtype), gaussian(rank, inner, seed=seed + 1, dtype=dtype), scale
    )


def oracle(x: LowRank | Tensor) -> Tensor:
    """The change as a matrix in float64, by the definition."""
    return x.scale * (x.B.double() @ x.A.double()) if isinstance(x, LowRank) else x.double()


def size(x: LowRank) -> float:
    """The size to which rounding in a product is relative."""
    return abs(x.scale) * float(x.B.double().norm() * x.A.double().norm())


def decaying(out: int, inner: int, spectrum: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A matrix of the given singular values, min(out, inner) of them."""
    n = min(out, inner)
    U, V = (torch.linalg.qr(gaussian(side, n, seed=seed + i)).Q for i, side in enumerate((out, inner)))
    return ((U * spectrum) @ V.T).to(dtype)


def check_spectrum(got: algebra.Spectrum, D: Tensor, k: int, tol: float, noise: float) -> None:
    """Against the dense SVD of D: the values, the product, orthonormal vectors, the signs."""
    S = torch.linalg.svdvals(D)
    assert (got.U.shape, got.S.shape, got.Vh.shape) == ((D.shape[0], k), (k,), (k, D.shape[1]))
    assert got.rank == k
    U, Sg, Vh = got.U.double(), got.S.double(), got.Vh.double()
    assert (Sg - S[:k]).abs().max() <= tol * noise
    assert (Sg[:-1] >= Sg[1:]).all()
    assert Sg.min() >= 0
    best = S[k:].square().sum().sqrt()
    assert (D - (U * Sg) @ Vh).norm() <= best + 3 * tol * noise
    one = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, one, rtol=0, atol=4 * tol)
    torch.testing.assert_close(Vh @ Vh.T, one, rtol=0, atol=4 * tol)
    largest = got.U.abs().max(dim=0).values
    for j in range(k):
        first = next(value for value in got.U[:, j].tolist() if abs(value) == float(largest[j]))
        assert first > 0


# One layer's cohort: how many clients, their ranks, scales and weights; out and in differ on purpose.
@st.composite
def cohorts(draw: st.DrawFn, dtype: torch.dtype) -> tuple[list[LowRank], list[float]]:
    out, inner = draw(st.sampled_from([(13, 7), (7, 13), (30, 20), (1, 5), (9, 9)]))
    ranks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    pairs = []
    for i, rank in enumerate(ranks):
        pair = pair_of(out, inner, rank, draw(st.sampled_from([0.5, 1.0, 2.0, 16 / 3])), 10 * i, dtype)
        kind = draw(st.sampled_from(["full", "full", "B = 0", "twin"]))
        if kind == "B = 0":
            pair = LowRank(torch.zeros_like(pair.B), pair.A, pair.scale)
        elif kind == "twin" and rank > 1:
            pair = LowRank(pair.B[:, :1].repeat(1, rank), pair.A, pair.scale)
        pairs.append(pair)
    weights = draw(st.lists(st.floats(-2, 2, width=32), min_size=len(pairs), max_size=len(pairs)))
    return pairs, weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cohort_is_the_dense_sum(dtype):
    @given(cohorts(dtype))
    def check(cohort):
        pairs, weights = cohort
        D = sum(weight * oracle(pair) for weight, pair in zip(weights, pairs))
        noise = sum(abs(weight) * size(pair) for weight, pair in zip(weights, pairs)) + 1e-30
        whole = algebra.stack(pairs, weights)
        assert whole.rank == sum(pair.rank for pair in pairs)
        assert whole.scale == 1.0
        assert whole.B.dtype == whole.A.dtype == dtype
        assert (oracle(whole) - D).norm() <= TOLERANCE[dtype] * noise
        # The same twice, and rounding of the stack aside: the spectrum of what was stacked.
        got = algebra.svd(whole)
        assert got.S.dtype == dtype
        check_spectrum(got, oracle(whole), min(*D.shape, whole.rank), TOLERANCE[dtype], size(whole) + 1e-30)

    check()


def test_stack_of_one_and_of_two():
    pair = pair_of(5, 4, 2, scale=3.0)
    one = algebra.stack([pair], [0.5])
    torch.testing.assert_close(one.dense(), 0.5 * pair.dense())
    assert torch.equal(one.B, pair.B)
    other = pair_of(5, 4, 3, scale=0.25, seed=5)
    two = algebra.stack([pair, other], [1.0, -2.0])
    assert torch.equal(two.B, torch.cat([pair.B, other.B], 1))
    assert torch.equal(two.A, torch.cat([3.0 * pair.A, -0.5 * other.A]))


def test_mixed_dtypes_take_the_widest_and_dtype_overrules():
    single, double = pair_of(6, 5, 2, dtype=torch.float32), pair_of(6, 5, 2, seed=3)
    assert algebra.stack([single, double], [1, 1]).A.dtype == torch.float64
    assert algebra.svd(LowRank(single.B, double.A, 1.0)).S.dtype == torch.float64
    assert algebra.svd(single, dtype=torch.float64).U.dtype == torch.float64
    assert algebra.truncate(double, 1, 1.0, dtype=torch.float32).B.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inner", "rank"), [(40, 24, 5), (24, 40, 23), (24, 40, 24), (6, 9, 20), (40, 3, 8)])
@pytest.mark.parametrize("top", [None, 1, 4, 99])
def test_svd_is_the_dense_one(dtype, out, inner, rank, top):
    pair = pair_of(out, inner, rank, scale=1.7, dtype=dtype)
    k = min(out, inner, rank, top or 99)
    for change in (pair, oracle(pair).to(dtype)):
        full = k if isinstance(change, LowRank) else min(out, inner, top or 99)
        check_spectrum(algebra.svd(change, top), oracle(change), full, TOLERANCE[dtype], size(pair))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shrink", [1.0, 1e-3, 1e-6, 1e-12, 0.0])
def test_svd_of_ill_conditioned_factors_keeps_orthonormal_vectors(dtype, shrink):
    # Clients that started from one A differ from it by a little: the stacked A is close to rank-deficient.
    shared, moved = gaussian(4, 30), gaussian(4, 30, seed=7)
    A = torch.cat([shared, shared + shrink * moved])
    pair = LowRank(gaussian(50, 8, seed=2, dtype=dtype), A.to(dtype), 1.0)
    check_spectrum(algebra.svd(pair), oracle(pair), 8, TOLERANCE[dtype], size(pair))
    # The best approximation of rank 6 has none of the directions that only rounding tells apart.
    check_spectrum(algebra.svd(pair, 6), oracle(pair), 6, TOLERANCE[dtype], size(pair))


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_of_nothing(dtype):
    nothing = LowRank(torch.zeros(6, 3, dtype=dtype), gaussian(3, 5, dtype=dtype), 2.0)
    for change in (nothing, LowRank(nothing.B, torch.zeros(3, 5, dtype=dtype), 2.0), torch.zeros(6, 5, dtype=dtype)):
        got = algebra.svd(change, 3)
        check_spectrum(got, torch.zeros(6, 5, dtype=torch.float64), 3, TOLERANCE[dtype], 1.0)
        assert got.S.eq(0).all()
        assert algebra.norm(change) == 0.0
        for split in ("b", "sqrt"):
            assert algebra.truncate(change, 2, 0.5, split).dense().eq(0).all()
    empty = algebra.svd(LowRank(torch.zeros(6, 0, dtype=dtype), torch.zeros(0, 5, dtype=dtype), 1.0))
    assert (empty.U.shape, empty.rank, empty.Vh.shape) == ((6, 0), 0, (0, 5))


def test_signs_are_fixed_and_ties_go_to_the_first():
    # The left vector is (-1, 1, 1, 1) / 2 up to its sign, all exact: the first entry decides.
    B = torch.tensor([[-1.0], [1.0], [1.0], [1.0]])
    for flip in (1.0, -1.0):
        for change in (LowRank(flip * B, torch.tensor([[2.0, 0, 0]]), 1.0), flip * B @ torch.tensor([[2.0, 0, 0]])):
            got = algebra.svd(change, 1)
            torch.testing.assert_close(got.U[:, 0], torch.tensor([0.5, -0.5, -0.5, -0.5]))
            torch.testing.assert_close(got.Vh[0], torch.tensor([-flip, 0.0, 0.0]))
    pair = pair_of(20, 15, 4)
    flipped = algebra.svd(LowRank(-pair.B, -pair.A, 1.0))
    torch.testing.assert_close(flipped.U, algebra.svd(pair).U, rtol=0, atol=1e-12)
    negative = algebra.svd(LowRank(pair.B, pair.A, -1.0))
    torch.testing.assert_close(negative.U, algebra.svd(pair).U, rtol=0, atol=1e-12)
    torch.testing.assert_close(negative.Vh, -algebra.svd(pair).Vh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["B", "A"])
@pytest.mark.parametrize("rank", [3, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_refuses_what_has_none(bad, part, rank, dtype):
    pair = pair_of(9, 8, rank, dtype=dtype)
    getattr(pair, part)[1, 2] = bad
    with pytest.raises(RunError, match="not finite"):
        algebra.svd(pair)
    W = torch.full((300, 300), bad, dtype=dtype)
    for change in (pair.B @ pair.A, W):  # exact, randomised
        with pytest.raises(RunError, match="not finite"):
            algebra.top_svd(change, 2)


# Shapes whose matrix would take 30 billion entries: only the factored form fits in any memory here.
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_matrix_is_formed(dtype):
    out, inner = 200_000, 150_000
    x, y = pair_of(out, inner, 3, 0.5, dtype=dtype), pair_of(out, inner, 2, 2.0, seed=9, dtype=dtype)
    got = algebra.svd(x)
    assert (got.U.shape, got.Vh.shape) == ((out, 3), (3, inner))
    assert float(got.S.double().square().sum().sqrt()) == pytest.approx(algebra.norm(x), rel=1e-6)
    both = algebra.stack([x, y], [1.0, 1.0])
    error = algebra.stack([algebra.truncate(both, 5, 3.0, "sqrt"), both], [1.0, -1.0], dtype=torch.float64)
    assert algebra.norm(error) < 1e-5 * algebra.norm(both)


@pytest.mark.parametrize(
    ("spectrum", "excess"),
    [
        (lambda j: torch.exp(-j / 30), 1e-5),
        (lambda j: 1 / (j + 1), 1e-5),
        (lambda j: torch.ones_like(j), 1e-6),
        (lambda j: (j < 25).double(), 1e-6),
        (lambda j: (j < 10).double(), 1e-6),
        (lambda j: 0 * j, 0.0),
    ],
)
@pytest.mark.parametrize("shape", [(300, 280), (270, 400)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_randomised_top_svd_is_nearly_the_best_and_tells_what_it_misses(spectrum, excess, shape, dtype):
    j = torch.arange(min(shape), dtype=torch.float64)
    W = decaying(*shape, spectrum(j), dtype)
    got = algebra.top_svd(W, 20)
    assert got.S.dtype == dtype
    U, S, Vh = got.U.double(), got.S.double(), got.Vh.double()
    missed, total = float((oracle(W) - (U * S) @ Vh).square().sum()), algebra.norm(W) ** 2
    # The measured excess in the norm and rounding, not more.
    assert math.sqrt(missed) <= (1 + excess) * float(spectrum(j)[20:].norm()) + 3e-6 * math.sqrt(total)
    assert algebra.tail_energy(got.S, total, 20) == pytest.approx(missed, rel=1e-5, abs=5e-6 * total)
    one = torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(Vh @ Vh.T, one, rtol=0, atol=1e-5)
    assert (got.U.gather(0, got.U.abs().argmax(0, keepdim=True)) > 0).all()


def test_top_svd_takes_the_exact_way_where_it_is_cheap(monkeypatch):
    calls = []
    real = algebra.svd
    monkeypatch.setattr(algebra, "svd", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    W = gaussian(400, 300, dtype=torch.float32)

    def exactly(W: Tensor, rank: int) -> bool:
        calls.clear()
        assert algebra.top_svd(W, rank).rank == min(rank, *W.shape)
        return bool(calls)

    assert exactly(W[:, :256], 4)
    assert not exactly(W, 34)  # 6 * (34 + 16) = 300
    assert exactly(W, 35)
    assert exactly(W, 400)


def test_the_bits_repeat_whatever_the_global_seed():
    W, pair = gaussian(400, 300, dtype=torch.float32), pair_of(300, 200, 16, dtype=torch.float32)

    def bits(spectrum: algebra.Spectrum) -> tuple[bytes, ...]:
        return tuple(t.contiguous().numpy().tobytes() for t in (spectrum.U, spectrum.S, spectrum.Vh))

    torch.manual_seed(1)
    first = algebra.top_svd(W, 5), algebra.svd(pair)
    torch.manual_seed(2)
    again = algebra.top_svd(W.clone(), 5), algebra.svd(LowRank(pair.B.clone(), pair.A.clone(), 1.0))
    assert [bits(x) for x in first] == [bits(x) for x in again]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", ["b", "sqrt"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 16 / 3])
@pytest.mark.parametrize("rank", [1, 3, 5, 40])
def test_truncate_is_the_best_approximation_at_any_scale(dtype, split, scale, rank):
    pair = pair_of(30, 18, 6, scale=2.5, dtype=dtype)
    for change in (pair, oracle(pair).to(dtype), pair_of(30, 18, 25, dtype=dtype)):
        W = oracle(change)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        got = algebra.truncate(change, rank, scale, split)
        assert got.scale == scale
        assert got.rank == min(rank, 18, change.rank if isinstance(change, LowRank) else 18)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert (oracle(got) - best).norm() <= 5 * TOLERANCE[dtype] * W.norm()
        rows, columns = got.A.double().norm(dim=1), got.B.double().norm(dim=0)
        k = min(got.rank, 6)
        if split == "b":
            torch.testing.assert_close(rows[:k], torch.ones(k, dtype=torch.float64), rtol=1e-5, atol=0)
            torch.testing.assert_close(columns[:k], S[:k] / scale, rtol=1e-5, atol=0)
        else:
            torch.testing.assert_close(rows[:k], (S[:k] / scale).sqrt(), rtol=1e-5, atol=0)
            torch.testing.assert_close(columns[:k], (S[:k] / scale).sqrt(), rtol=1e-5, atol=0)


def test_one_spectrum_serves_all_ranks():
    W = gaussian(30, 18)
    spectrum = algebra.svd(W, 8)
    for rank in (1, 4, 8):
        torch.testing.assert_close(
            algebra.factors(spectrum, rank, 2.0).dense(), algebra.truncate(W, rank, 2.0).dense(), rtol=0, atol=1e-12
        )
    assert algebra.factors(spectrum, 9, 2.0).rank == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_tail_energy_is_what_truncation_loses(dtype):
    W = decaying(40, 25, torch.exp(-torch.arange(25.0).double() / 4), dtype)
    S = torch.linalg.svdvals(W.double())
    for held in (3, 10, 25):
        for rank in (0, 2, held, held + 5):
            got = algebra.tail_energy(algebra.svd(W, held).S, algebra.norm(W) ** 2, rank)
            assert got == pytest.approx(float(S[min(rank, held) :].square().sum()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_tail_energy_is_exactly_zero_where_nothing_is_left(dtype, seed):
    pair = pair_of(500, 300, 6, scale=3.0, seed=seed, dtype=dtype)
    W = pair.dense()
    for spectrum in (algebra.svd(pair), algebra.top_svd(W, 6), algebra.svd(W, 6)):
        assert algebra.tail_energy(spectrum.S, algebra.norm(W) ** 2, 6) == 0.0
        assert algebra.tail_energy(spectrum.S, algebra.norm(W) ** 2, 5) > 0.0
    assert algebra.tail_energy(torch.zeros(3), 0.0, 1) == 0.0
    assert algebra.tail_energy(torch.zeros(0), 7.0, 0) == 7.0


def test_pad_adds_ranks_that_can_train_and_changes_nothing():
    pair, fresh = pair_of(9, 7, 2, scale=3.0, dtype=torch.float32), gaussian(6, 7, seed=4)
    got = algebra.pad(pair, 5, fresh)
    assert got.scale == 3.0
    assert torch.equal(got.B, torch.cat([pair.B, torch.zeros(9, 3)], 1))
    assert torch.equal(got.A, torch.cat([pair.A, fresh[2:5].float()]))
    assert torch.equal(algebra.pad(pair, 2, fresh).A, pair.A)
    with pytest.raises(ValueError, match="rank: got 1"):
        algebra.pad(pair, 1, fresh)


def test_revive_replaces_dead_ranks_alone():
    fresh = gaussian(6, 7, seed=4)
    alive = pair_of(9, 7, 6, scale=3.0)
    B, A = alive.B.clone(), alive.A.clone()
    B[:, 0], A[0] = 0, 0  # dead
    B[:, 1], A[1] = 1e-6, 1e-6  # dead but for rounding
    B[:, 2] = 0  # an untrained rank: A is alive
    A[3] = 0  # B is alive
    B[:, 4], A[4] = 1e-3, 1e-3  # small, and alive
    pair = LowRank(B, A, 3.0)
    got = algebra.revive(pair, fresh)
    assert torch.equal(got.A[:2], fresh[:2])
    assert got.B[:, :2].eq(0).all()
    assert torch.equal(got.A[2:], A[2:])
    assert torch.equal(got.B[:, 2:], B[:, 2:])
    assert (got.dense() - pair.dense()).norm() <= 3.0 * 1e-8 * fresh[:2].square().sum()
    assert torch.equal(pair.B[:, 1], B[:, 1])
    # The limit is a share of the fresh row's norm, for both factors.
    edge = LowRank(torch.ones(1, 1), torch.ones(1, 1), 1.0)
    assert algebra.revive(edge, torch.tensor([[10100.0]])).A.item() == 10100.0
    assert algebra.revive(edge, torch.tensor([[9900.0]])).A.item() == 1.0


def test_revived_split_of_a_poor_change_trains_in_every_rank():
    # A change of rank 2 in a pair of rank 4, split by roots: two ranks would never receive a gradient.
    pair = algebra.truncate(algebra.svd(pair_of(9, 7, 2), 2).U @ gaussian(2, 7), 4, 1.0, "sqrt")
    got = algebra.revive(pair, gaussian(4, 7, seed=8))
    assert got.A.norm(dim=1).min() > 0.1
    torch.testing.assert_close(got.dense(), pair.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("old", "new"), [(2.0, 0.5), (-1.5, 7.0), (16 / 3, 4.0)])
def test_rescale_keeps_the_change(dtype, old, new):
    pair = pair_of(9, 7, 3, scale=old, dtype=dtype)
    got = algebra.rescale(pair, new)
    assert got.scale == new
    assert torch.equal(got.A, pair.A)
    assert got.B.dtype == dtype
    assert (oracle(got) - oracle(pair)).norm() <= TOLERANCE[dtype] * oracle(pair).norm()
    assert torch.equal(algebra.rescale(pair_of(9, 7, 3, 2.0), 0.5).dense(), pair_of(9, 7, 3, 2.0).dense())


@given(
    st.sampled_from([(13, 7), (7, 13), (40, 30)]),
    st.sampled_from([0, 1, 3, 6, 7, 20]),
    st.sampled_from(DTYPES),
)
def test_norm_is_the_dense_one(shape, rank, dtype):
    pair = pair_of(*shape, rank, -0.7, 20 * rank, dtype)
    for x in (pair, pair.dense()):
        assert algebra.norm(x) == pytest.approx(float(oracle(x).norm()), rel=1e-12)


def test_norm_of_pairs_that_cancel():
    for seed in range(20):  # rounding makes some of these squares negative
        x = pair_of(60, 40, 4, seed=seed)
        M = gaussian(4, 4, seed=seed + 50)
        nothing = algebra.stack([x, LowRank(x.B @ M, torch.linalg.solve(M, x.A), 1.0)], [1.0, -1.0])
        assert algebra.norm(nothing) <= 1e-8 * size(nothing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_is_the_sum_in_the_matrix_dtype(dtype):
    W, pair = gaussian(9, 7, seed=5, dtype=dtype), pair_of(9, 7, 3, scale=2.5)
    before, expected = W.clone(), oracle(W) - 0.3 * oracle(pair)
    got = algebra.add(W, pair, -0.3)
    assert got.dtype == dtype
    assert torch.equal(W, before)
    assert (oracle(got) - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    torch.testing.assert_close(algebra.add(before, pair), before + oracle(pair).to(dtype))


@pytest.mark.filterwarnings("error")
def test_parameters_give_results_without_gradient():
    pair = pair_of(30, 20, 3, dtype=torch.float32)
    pair = LowRank(pair.B.requires_grad_(), pair.A.requires_grad_(), 1.0)
    W = gaussian(30, 20, dtype=torch.float32).requires_grad_()
    fresh = gaussian(5, 20).requires_grad_()
    spectra = [algebra.svd(pair), algebra.svd(W), algebra.top_svd(gaussian(300, 300).requires_grad_(), 2)]
    results = [
        algebra.stack([pair], [1.0]),
        algebra.truncate(pair, 2, 1.0),
        algebra.pad(pair, 5, fresh),
        algebra.revive(pair, fresh),
        algebra.rescale(pair, 2.0),
    ]
    tensors = [t for s in spectra for t in (s.U, s.S, s.Vh)] + [t for r in results for t in (r.B, r.A)]
    assert not any(t.requires_grad for t in [*tensors, algebra.add(W, pair)])
    for x in (pair, W):
        assert algebra.norm(x) > 0
    assert algebra.tail_energy(W[0].abs(), 1e9, 1) > 0


def test_inner_products_are_those_of_the_matrices() -> None:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    core = LowRank(draw(7, 2), draw(2, 5), 0.5, draw(2, 2))
    changes = [
        LowRank(draw(7, 1), draw(1, 5), 2.0),
        draw(7, 5),
        LowRank(draw(7, 6), draw(6, 5), -1.0),
        core,
        draw(7, 5),
    ]
    flat = torch.stack([(x.dense() if isinstance(x, LowRank) else x).flatten() for x in changes])
    torch.testing.assert_close(algebra.inner_products(changes), flat @ flat.T)
    torch.testing.assert_close(algebra.inner_products(changes[1:2]), flat[1:2] @ flat[1:2].T)
    assert algebra.inner_products([]).shape == (0, 0)
