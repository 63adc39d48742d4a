"""The mean of products: exact at any size, in bounded memory, and no more multiplications than it takes."""

from __future__ import annotations

import pytest
import torch
from method_oracles import dense, relative

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import ProductMean, Profile, Update, product_change

SHAPES = {"small": (40, 30), "large": (300, 280)}  # multiplied in float64 and in float32


def cohort(ranks, seed=0):
    """Updates of clients of these ranks. Clients of equal rank share a start."""
    rng = torch.Generator().manual_seed(seed)
    starts = {}
    for k, rank in enumerate(ranks):
        if rank not in starts:
            pairs = {
                name: LowRank(torch.randn(out, rank, generator=rng), torch.randn(rank, inner, generator=rng), 2 / rank)
                for name, (out, inner) in SHAPES.items()
            }
            starts[rank] = Adapter(pairs, {"bias": torch.zeros(3)})
            starts[rank] = (starts[rank].flatten(), starts[rank].layout)
        vector, layout = starts[rank]
        yield Update(Profile(k, rank), 1.0 + k % 3, vector, torch.randn(len(vector), generator=rng), layout)


@pytest.mark.parametrize("clients", [2, 60])
def test_both_sums_are_those_of_dense_matrices(clients):
    updates = list(cohort([(1, 2, 4, 8)[k % 4] for k in range(clients)]))
    products, changes, weight = ProductMean(), ProductMean(), sum(u.weight for u in updates)
    for u in updates:
        products.add(u.weight, u, u.trained.layers)
        changes.add_change(u.weight, u)
    for name in SHAPES:
        trained = sum(u.weight / weight * dense(u.trained.layers[name]) for u in updates)
        changed = sum(u.weight / weight * dense(product_change(u)[name]) for u in updates)
        assert relative(products.matrix(name), trained) < 1e-6
        assert relative(changes.matrix(name), changed) < 1e-6
        assert torch.equal(changes.matrix(name), changes.matrix(name))  # a second look changes nothing
        limit = min(SHAPES[name])
        for mean in (products, changes):
            assert sum(pair.rank for _, pair in mean._pairs[name]) < limit


def test_a_start_that_clients_share_is_multiplied_once(monkeypatch):
    multiplied, matmul = [], torch.Tensor.__matmul__

    def spy(B, A):
        multiplied.append((len(B), len(A)))
        return matmul(B, A)

    mean, (clients, rank) = ProductMean(), (18, 8)
    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    for update in cohort([rank] * clients):
        mean.add_change(update.weight, update)
    # 2 x 144 ranks fill the large layer's stack. Its changes of B have 144 ranks, and the shared B has 8.
    assert [ranks for out, ranks in multiplied if out == 300] == [clients * rank + rank]


def test_factors_at_one_address_are_told_apart():
    B = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    A = torch.randn(8, 280, generator=torch.Generator().manual_seed(1))
    mean, expected = ProductMean(), torch.zeros(300, 280).double()
    mean.weight = 1.0
    for rank in (2, 4, 8, 8) * 15:
        mean.add_product("x", 0.5, LowRank(B[:, :rank], A[:rank], 1.0))
        expected += 0.5 * dense(LowRank(B[:, :rank], A[:rank], 1.0))
    assert relative(mean.matrix("x"), expected) < 1e-6
