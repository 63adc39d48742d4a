"""HetLoRA against its equations on dense float64 factors: zero padding, norm weights, pruning, and its law of decay."""

from __future__ import annotations

import pytest
import torch
from method_oracles import close, training

from rayfed.lora.adapter import Adapter, LowRank, fresh_adapter
from rayfed.methods.base import Profile
from rayfed.methods.hetlora import HetLoRA
from rayfed.objectives.tail_penalty import TailPenalty

SHAPES = {"tall": (7, 5), "a.wide": (4, 9)}
RANKS = (1, 4, 2, 4, 1)
ROUNDS = ([0, 1, 2], [4, 2], [3], [1, 2, 0, 4])
SCALE = 1.5  # of the global factors
PLAIN = {"weighting": "given", "regularizer": 0.0, "prune": False}


def profile(k, **more):
    return Profile(k, RANKS[k], 6 / RANKS[k], examples=3 + 2 * k, **more)


def tails(factor):
    """Training that multiplies the last half of the ranks, in both factors."""

    def train(client, start, adapter):
        layers = {}
        for name, pair in adapter.layers.items():
            by = torch.where(torch.arange(pair.rank) >= pair.rank // 2, factor, 1.0)
            layers[name] = LowRank(pair.B * by, pair.A * by[:, None], pair.scale)
        return Adapter(layers, adapter.head)

    return train


def begin(random_adapter, kind):
    if kind == "random":
        return random_adapter(SHAPES, 4, SCALE, 0)
    return fresh_adapter(SHAPES, {"head.weight": torch.ones(3, 5)}, 4, SCALE, 0)


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize("weighting", ["norm", "given"])
@pytest.mark.parametrize("up", [1.0, 0.3])
def test_is_the_zero_padded_mean_of_factors(play, random_adapter, kind, weighting, up):
    method, train, start = HetLoRA(weighting=weighting, prune=False), training(1), begin(random_adapter, kind)
    state = method.init(start, 0)
    for members in ROUNDS:
        state, updates = play(method, state, [profile(k, density_up=up) for k in members], train)
        trained = [u.layout.unflatten(u.start.double() + u.change.double()) for u in updates]
        if weighting == "given":
            p = [u.client.examples for u in updates]
        else:
            p = [sum((x.scale * x.B @ x.A).square().sum() for x in t.layers.values()).sqrt() for t in trained]
        p = [float(share / sum(p)) for share in p]
        for name, (out, inner) in SHAPES.items():
            B, A = torch.zeros(out, 4, dtype=torch.float64), torch.zeros(4, inner, dtype=torch.float64)
            for share, t in zip(p, trained):
                pair = t.layers[name]
                B[:, : pair.rank] += share * pair.scale / SCALE * pair.B
                A[: pair.rank] += share * pair.A
            close(method.delta(state, name), SCALE * B @ A)
        head = sum(s * t.head["head.weight"] for s, t in zip(p, trained))
        close(method.head(state)["head.weight"], head)
        assert state.report["weights_max"] == pytest.approx(max(p))
        assert state.report["effective_cohort"] == pytest.approx(1 / sum(s**2 for s in p))


def test_the_product_of_index_j_shrinks_by_q_squared(play, random_adapter):
    method, clients, start = HetLoRA(**PLAIN), [profile(k) for k in range(5)], begin(random_adapter, "random")
    whole, state = sum(c.examples for c in clients), method.init(start, 0)
    q = torch.tensor([sum(c.examples for c in clients if c.rank > j) / whole for j in range(4)], dtype=torch.float64)
    for t in range(1, 4):
        state, _ = play(method, state, clients)
        for name, pair in start.layers.items():
            close(state.layers[name], SCALE * pair.B.double() * q ** (2 * t) @ pair.A.double())


def test_what_a_sparse_download_keeps_back_is_unmoved(play, random_adapter):
    method, start = HetLoRA(**PLAIN), begin(random_adapter, "random")
    clients = [profile(k, density_down=0.5) for k in (1, 3)]
    state, updates = play(method, method.init(start, 0), clients, training(2))
    for name, pair in start.layers.items():
        B, A, n = pair.B.double(), pair.A.double(), sum(c.examples for c in clients)
        for u in updates:
            change = u.layout.unflatten(u.change.double()).layers[name]
            B += u.client.examples / n * change.B
            A += u.client.examples / n * change.A
        close(state.layers[name], SCALE * B @ A)


def test_an_index_nobody_had_can_be_trained_again(play, random_adapter):
    method, start = HetLoRA(), begin(random_adapter, "random")
    state, _ = play(method, method.init(start, 0), [profile(2)], training(3))
    sent = method.broadcast(state, profile(1))
    for name, pair in sent.layout.unflatten(sent.vector).layers.items():
        assert not pair.B[:, 2:].any()
        assert torch.equal(pair.A[2:], start.layers[name].A[2:])
        assert pair.B[:, :2].any()


def test_a_client_whose_tail_shrank_keeps_fewer_ranks(play, random_adapter):
    method = HetLoRA(gamma=0.5)
    assert method.personal
    assert not HetLoRA(prune=False).personal
    state, clients = method.init(begin(random_adapter, "random"), 0), [profile(k) for k in (0, 1, 2)]

    def ranks():
        sent = [method.broadcast(state, client).layout for client in clients]
        assert [layout.scales["tall"] for layout in sent] == [client.scale for client in clients]
        return [layout.unflatten(torch.zeros(layout.size)).layers["tall"].rank for layout in sent]

    for train, expected in (
        (None, [1, 4, 2]),
        (tails(1.1), [1, 4, 2]),
        (tails(0.9), [1, 2, 1]),
        (tails(0.9), [1, 1, 1]),
    ):
        state, _ = play(method, state, clients, train)
        assert ranks() == expected
    assert method.broadcast(state, profile(3)).layout.size > method.broadcast(state, profile(1)).layout.size
    assert state.report["rank_mean"] == 1.0
    state, _ = play(
        HetLoRA(gamma=0.5, prune=False), method.init(begin(random_adapter, "random"), 0), clients, tails(0.9)
    )
    assert not state.clients


def test_the_tail_is_regularised(random_adapter):
    state = HetLoRA().init(begin(random_adapter, "random"), 0)
    wide = Profile(0, 100, 1.0)
    assert HetLoRA(regularizer=0.1).trainable(state, wide).objective == TailPenalty(0.1, 99)
    assert HetLoRA(regularizer=0.1, prune=False, gamma=0.29).trainable(state, wide).objective == TailPenalty(0.1, 29)
    assert HetLoRA().trainable(state, profile(1)).objective == TailPenalty(1e-3, 3)
    assert HetLoRA().trainable(state, profile(0)).objective is None  # one rank has no tail
    assert HetLoRA(regularizer=0.0).trainable(state, profile(1)).objective is None


def test_round_zero_without_training_keeps_everything(play, random_adapter):
    """All products are zero there: norms say nothing about weights."""
    method, start = HetLoRA(), begin(random_adapter, "fresh")
    state, _ = play(method, method.init(start, 0), [profile(1), profile(3)])
    for name, pair in start.layers.items():
        torch.testing.assert_close(state.layers[name].A, pair.A)
        assert not state.layers[name].B.any()
    assert state.report["weights_max"] == pytest.approx(0.5)
