"""An upload that stays sparse is the upload that is dense, to the last bit."""

from __future__ import annotations

import pytest
import torch

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import METHODS, PackSum, Profile, Trainable, Update, build
from rayfed.methods.base import Sparse, mean_change

ADAPTER = Adapter({"a": LowRank(torch.zeros(40, 3), torch.zeros(3, 30), 0.5)}, {"head": torch.zeros(1_100, 40)})
LAYOUT = ADAPTER.layout
N = LAYOUT.size  # longer than a piece of a dense sum


def both(density: float, seed: int, weight: float) -> tuple[Update, Update]:
    """One client's update with its change sparse, and the same with its change dense."""
    g = torch.Generator().manual_seed(seed)
    indices = (torch.rand(N, generator=g) < density).nonzero().squeeze(1)
    values = torch.randn(len(indices), generator=g) * 10 ** torch.randint(-30, 30, (len(indices),), generator=g)
    values[::7] = -0.0
    dense = torch.zeros(N)
    dense[indices] = values
    start, client = torch.randn(N, generator=g), Profile(seed, 3)
    return (
        Update(client, weight, start, Sparse(N, indices, values), LAYOUT),
        Update(client, weight, start, dense, LAYOUT),
    )


def test_the_dense_sum_is_longer_than_one_piece():
    assert N > 2**15


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_both_forms_add_the_same_bits(density):
    pairs = [both(density, seed, weight) for seed, weight in enumerate((0.3, 7.0, 1 / 3, 0.0))]
    totals = [torch.zeros(N, dtype=torch.float64) for _ in range(2)]
    plain = torch.zeros(N, dtype=torch.float64)
    for pair in pairs:
        for update, total in zip(pair, totals):
            update.add_to(total)
        plain += pair[1].weight * pair[1].change.double()
        assert torch.equal(pair[0].change, pair[1].change)
        assert torch.equal(pair[0].trained.flatten(), pair[1].trained.flatten())
    assert torch.equal(totals[0].view(torch.int64), plain.view(torch.int64))
    assert torch.equal(totals[1].view(torch.int64), plain.view(torch.int64))
    means = [mean_change(column, N) for column in zip(*pairs)]
    assert torch.equal(means[0].view(torch.int32), means[1].view(torch.int32))


def test_trainables_are_alike_only_if_they_surely_answer_alike():
    entries = torch.ones(N, dtype=torch.bool)
    plain = Trainable()
    assert plain.same_support(Trainable(rates={"A": 0.5}))  # a rate changes no choice
    assert Trainable(entries=entries).same_support(Trainable(entries=entries))
    for other in (
        Trainable(parts=("B",)), Trainable(received_only=True), Trainable(personal=("B",)), Trainable(entries=entries),
    ):  # fmt: skip
        assert not plain.same_support(other)
    assert not Trainable(entries=entries).same_support(Trainable(entries=entries.clone()))


def test_a_sum_of_packs_is_the_mean_within_rounding():
    cohort = [both(0.3, seed, 1.0 + seed)[0] for seed in range(7)]
    packs = [PackSum.of([(u.weight, u.sparse_change) for u in pack], N) for pack in (cohort[:3], cohort[3:])]
    weights = torch.tensor([u.weight for u in cohort], dtype=torch.float64)
    dense = (weights[:, None] * torch.stack([u.change.double() for u in cohort])).sum(0) / weights.sum()
    size = (weights[:, None] * torch.stack([u.change.double().abs() for u in cohort])).sum(0) / weights.sum()
    assert ((mean_change(packs, N).double() - dense).abs() <= 2**-24 * dense.abs() + 1e-14 * size + 2**-149).all()
    assert sum(pack.weight for pack in packs) == 28.0


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5])
def test_the_sum_of_one_update_adds_its_bits_and_stays_sparse_if_it_is(density):
    updates = [both(density, seed, weight)[0] for seed, weight in enumerate((0.3, 7.0, 1 / 3))]
    packs = [PackSum.of([(update.weight, update.sparse_change)], N) for update in updates]
    assert all((pack.indices is None) == (density == 0.5) for pack in packs)
    sent = [len(update.sparse_change.indices) for update in updates]
    assert density == 0.5 or [len(pack.total) for pack in packs] == [len(pack.indices) for pack in packs] == sent
    few = PackSum.of([(update.weight, update.sparse_change) for update in updates], N)
    assert (few.indices is None) == (density == 0.5)
    means = [mean_change(stream, N).view(torch.int32) for stream in (updates, packs, [few])]
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


def test_a_sum_that_may_only_be_read_is_added(recwarn):
    one = torch.zeros(N)
    one[3] = 4.0
    dense, sparse = PackSum.of([(2.0, torch.ones(N))], N), PackSum.of([(2.0, one)], N)
    for array in (dense.total, sparse.total, sparse.indices):
        array.flags.writeable = False  # as it comes out of Ray's object store
    assert torch.equal(mean_change([dense, dense], N), torch.ones(N))
    assert torch.equal(mean_change([sparse, sparse], N), one)
    assert not recwarn.list


@pytest.mark.parametrize("name", [name for name in METHODS if build(name).sum_in_worker])
def test_a_linear_method_asks_for_nothing_but_the_sum(name):
    """Its next state from sums of packs is that from the updates, to rounding; of whole numbers, to the bit."""
    method = build(name)
    state = method.init(ADAPTER, seed=0)
    start = method.broadcast(state, Profile(0, 3))
    n = start.layout.size
    cohort = [
        Update(Profile(k, 3), 1.0 + k % 2, start.vector, torch.arange(n).remainder(5 + k).float() - 2, start.layout)
        for k in range(6)
    ]
    packs = [PackSum.of([(u.weight, u.sparse_change) for u in pack], n) for pack in (cohort[:2], cohort[2:])]
    before, whole, summed = (
        s.tensors() for s in (state, *(method.aggregate(state, iter(stream)) for stream in (cohort, packs)))
    )
    assert not all(torch.equal(before[name], whole[name]) for name in whole)
    assert all(torch.equal(whole[name], summed[name]) for name in whole)
