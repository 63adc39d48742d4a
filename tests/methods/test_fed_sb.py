"""Fed-SB against matrices: the mean of cores is the mean of products, and nothing but cores and the head moves."""

from __future__ import annotations

import pytest
import torch

from rayfed.lora.adapter import Adapter, LowRank, fresh_adapter
from rayfed.methods import build
from rayfed.methods.base import Profile

SHAPES = {"wide": (4, 9), "tall": (7, 5)}
HEAD = {"head.weight": torch.ones(3, 5)}


def clients(*densities: float) -> list[Profile]:
    return [Profile(k, 3, 2.0, density_up=d, examples=k + 1) for k, d in enumerate(densities)]


def fresh():
    return fresh_adapter(SHAPES, HEAD, 3, 2.0, seed=5)


def trained(client, start, adapter):
    """Every client moves its core and the head by amounts of its own; A and B would move too, if they were let."""
    g = torch.Generator().manual_seed(client.client + int(1e6 * float(start.vector.abs().sum()) % 1000))
    layers = {
        name: LowRank(p.B + 1, p.A + 1, p.scale, p.R + torch.randn(p.R.shape, generator=g))
        for name, p in adapter.layers.items()
    }
    return Adapter(layers, {n: t + torch.randn(t.shape, generator=g) for n, t in adapter.head.items()})


@pytest.mark.parametrize("densities", [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.3)])
def test_the_global_change_is_the_mean_of_what_clients_uploaded(play, densities):
    method = build("fed_sb")
    state = method.init(fresh(), seed=1)
    for _ in range(3):
        before = {name: method.delta(state, name) for name in SHAPES}
        state, updates = play(method, state, clients(*densities), trained)
        total = sum(u.weight for u in updates)
        for name in SHAPES:
            wanted = before[name].dense().double()
            for u in updates:
                p, q = u.trained.layers[name], u.sent.layers[name]
                difference = p.B.double() @ p.R.double() @ p.A.double() - q.B.double() @ q.R.double() @ q.A.double()
                wanted = wanted + u.weight / total * 2.0 * difference
            got = method.delta(state, name).dense().double()
            assert float((got - wanted).norm() / wanted.norm()) < 1e-6
        head = sum(u.weight / total * u.trained.head["head.weight"].double() for u in updates)
        assert float((state.head["head.weight"].double() - head).norm() / head.norm()) < 1e-6


def test_only_cores_and_the_head_travel_and_train(play):
    method = build("fed_sb")
    state = method.init(fresh(), seed=1)
    start = method.broadcast(state, clients(1.0)[0])
    assert int((~start.known).sum()) == 2 * 9 + 15
    _, (update,) = play(method, state, clients(1.0), trained)
    moved = {
        entry.part
        for entry in update.layout.entries
        if bool(update.change[entry.start : entry.start + entry.numel].any())
    }
    assert moved == {"R", "head"}


def test_factors_are_orthonormal_and_follow_the_seed():
    method = build("fed_sb")
    one, again, other = (method.init(fresh(), seed) for seed in (1, 1, 2))
    for name, pair in one.layers.items():
        torch.testing.assert_close(pair.B.T @ pair.B, torch.eye(3), rtol=0, atol=1e-6)
        torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(3), rtol=0, atol=1e-6)
        assert torch.equal(pair.A, again.layers[name].A)
        assert not torch.equal(pair.A, other.layers[name].A)


def test_ranks_are_nested_in_the_core(play):
    """A client of rank r trains and sends r x r entries a layer, and the mean of the padded changes is exact."""
    method = build("fed_sb")
    state, _ = play(method, method.init(fresh(), seed=1), clients(1.0), trained)
    mixed = [Profile(0, 3, 2.0, examples=3), Profile(1, 1, 6.0, examples=1), Profile(2, 2, 3.0, examples=2)]
    after, updates = play(method, state, mixed, trained)
    for update in updates:
        r = update.client.rank
        assert int((update.change != 0).sum()) == 2 * r * r + 15
        start = method.broadcast(state, update.client)
        assert int((~start.known).sum()) == 2 * r * r + 15
        for name, pair in update.sent.layers.items():
            assert torch.equal(pair.R[:r, :r], state.layers[name].R[:r, :r])
            assert not pair.R[r:].any()
            assert not pair.R[:, r:].any()
    for name in SHAPES:
        wanted = method.delta(state, name).dense().double()
        for u in updates:
            p, q = (side.layers[name].folded() for side in (u.trained, u.sent))
            wanted += u.weight / 6 * 2.0 * (p.B.double() @ p.A.double() - q.B.double() @ q.A.double())
        got = method.delta(after, name).dense().double()
        assert float((got - wanted).norm() / wanted.norm()) < 1e-6
