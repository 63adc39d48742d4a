"""FLoRA against dense float64 sums: everything a client learned reaches the base, and the news tells all of it."""

from __future__ import annotations

import pytest
import torch
from method_oracles import begun, dense, mean_of_products, relative, training

from rayfed.methods import Profile
from rayfed.methods.flora import FLoRA, fresh_A

SHAPES = {"wide": (4, 9), "tall": (7, 5)}
COHORTS = [
    [Profile(0, 4, 2.0, examples=3), Profile(1, 1, 8.0, examples=1), Profile(2, 2, 4.0, examples=5)],
    [Profile(3, 2, 4.0, density_up=0.3, examples=2), Profile(1, 1, 8.0, examples=1)],
    [Profile(5, 4, 2.0, examples=7)],
]


@pytest.mark.parametrize("zero", [True, False])
def test_base_gains_the_mean_of_products_and_nothing_is_lost(play, random_adapter, zero):
    method, start, train = FLoRA(), begun(random_adapter, zero), training(2)
    state = method.init(start, seed=7)
    W = {name: dense(pair) for name, pair in start.layers.items()}
    head = start.head["head.weight"].double()
    for cohort in COHORTS:
        state, updates = play(method, state, cohort, train)
        total = sum(u.weight for u in updates)
        head += sum(u.weight / total * u.layout.unflatten(u.change).head["head.weight"].double() for u in updates)
        for name in SHAPES:
            W[name] += mean_of_products(updates, name)
            assert relative(method.delta(state, name), W[name]) < 1e-6
        assert relative(method.head(state)["head.weight"], head) < 1e-6


def test_base_is_the_sum_of_the_news(play, random_adapter):
    method, train = FLoRA(), training(3)
    state = method.init(begun(random_adapter, False), seed=7)
    assert method.base_update(method.init(begun(random_adapter, True), seed=7)) is None
    for cohort in COHORTS:
        before = {name: W.clone() for name, W in state.base.items()}
        state, _ = play(method, state, cohort, train)
        news, R = method.base_update(state), sum(client.rank for client in cohort)
        assert news.shape == (R * sum(out + inner for out, inner in SHAPES.values()),)
        assert news.dtype == torch.float32
        at = 0
        for name in sorted(SHAPES):
            out, inner = SHAPES[name]
            B = news[at : at + out * R].view(out, R)
            A = news[at + out * R : at + (out + inner) * R].view(R, inner)
            at += (out + inner) * R
            assert torch.equal(before[name].addmm(B.clone(), A.clone()), state.base[name])


def test_start_is_fresh_nested_alive_and_known(play, random_adapter):
    method = FLoRA()
    state = method.init(begun(random_adapter, False), seed=7)
    later, _ = play(method, state, COHORTS[0])
    starts = {rank: method.broadcast(state, Profile(0, rank, 8.0 / rank)) for rank in (1, 2, 4)}
    adapters = {rank: start.layout.unflatten(start.vector) for rank, start in starts.items()}
    other = method.broadcast(later, Profile(0, 4, 2.0))
    for name, (_, inner) in SHAPES.items():
        A = adapters[4].layers[name].A
        assert torch.equal(A, fresh_A(7, name, 0, 4, inner))
        assert not torch.equal(A, other.layout.unflatten(other.vector).layers[name].A)
        assert float(A.abs().max()) <= inner**-0.5
        for rank, adapter in adapters.items():
            pair = adapter.layers[name]
            assert (pair.rank, pair.scale) == (rank, 8.0 / rank)
            assert torch.equal(pair.A, A[:rank])
            assert bool((pair.A.norm(dim=1) > 0).all())
            assert not pair.B.any()
    assert torch.equal(starts[2].known, ~starts[2].layout.mask("head"))
    assert starts[2].base is state.base
