"""FlexLoRA against its equations on dense float64 matrices, and its law of decay."""

from __future__ import annotations

import pytest
import torch
from method_oracles import close, dense, product, training, truncation

from rayfed.lora.adapter import fresh_adapter
from rayfed.methods.base import Profile
from rayfed.methods.flexlora import FlexLoRA

SHAPES = {"tall": (7, 5), "a.wide": (4, 9)}
RANKS = (1, 4, 2, 4, 1)
ROUNDS = ([0, 1, 2], [4, 2], [3], [1, 2, 0, 4])


def profile(k, **more):
    return Profile(k, RANKS[k], 6 / RANKS[k], examples=3 + 2 * k, **more)


def begin(random_adapter, kind):
    if kind == "random":
        return random_adapter(SHAPES, 4, 1.5, 0)
    return fresh_adapter(SHAPES, {"head.weight": torch.ones(3, 5)}, 4, 1.5, 0)


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize("up", [1.0, 0.3])
def test_is_the_mean_of_products(play, random_adapter, kind, up):
    method, train = FlexLoRA(), training(1)
    state = method.init(begin(random_adapter, kind), 0)
    head = state.head["head.weight"].double()
    for members in ROUNDS:
        state, updates = play(method, state, [profile(k, density_up=up) for k in members], train)
        p = [u.client.examples / sum(v.client.examples for v in updates) for u in updates]
        for name in SHAPES:
            close(method.delta(state, name), sum(s * product(u, name, True) for s, u in zip(p, updates)))
        head = head + sum(s * u.layout.unflatten(u.change).head["head.weight"].double() for s, u in zip(p, updates))
        close(method.head(state)["head.weight"], head)


@pytest.mark.parametrize("up", [1.0, 0.3])
def test_what_a_sparse_download_keeps_back_is_not_lost(play, random_adapter, up):
    method, train = FlexLoRA(), training(2)
    state = method.init(begin(random_adapter, "random"), 0)
    D = {name: dense(state.layers[name]) for name in SHAPES}
    for members in ROUNDS:
        clients = [profile(k, density_down=0.5 if k % 2 else 1.0, density_up=up) for k in members]
        state, updates = play(method, state, clients, train)
        p = [u.client.examples / sum(v.client.examples for v in updates) for u in updates]
        for name in SHAPES:
            D[name] = sum(
                s * (truncation(D[name], u.client.rank) + product(u, name, True) - product(u, name, False))
                for s, u in zip(p, updates)
            )
            close(method.delta(state, name), D[name])


def test_a_client_starts_from_the_best_approximation_of_its_rank(play, random_adapter):
    method = FlexLoRA()
    state = method.init(begin(random_adapter, "random"), 0)
    for _ in range(2):
        for client in map(profile, range(3)):
            start = method.broadcast(state, client)
            for name, pair in start.layout.unflatten(start.vector).layers.items():
                assert pair.scale == client.scale
                close(pair, truncation(dense(state.layers[name]), client.rank))
                torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(client.rank))  # S is in B
        state, _ = play(method, state, [profile(k) for k in range(5)], training(3))


def test_singular_value_j_decays_by_the_weight_of_those_who_have_it(play, random_adapter):
    method, clients = FlexLoRA(), [profile(k) for k in range(5)]
    first = state = method.init(begin(random_adapter, "random"), 0)
    whole = sum(c.examples for c in clients)
    q = torch.tensor([sum(c.examples for c in clients if c.rank > j) / whole for j in range(4)], dtype=torch.float64)
    for t in range(1, 4):
        state, _ = play(method, state, clients)
        for name in SHAPES:
            U, S, Vh = torch.linalg.svd(dense(first.layers[name]), full_matrices=False)
            close(state.layers[name], (U[:, :4] * (q**t * S[:4])) @ Vh[:4])


def test_no_rank_is_ever_dead(play, random_adapter):
    method, fresh = FlexLoRA(), begin(random_adapter, "fresh")
    state = method.init(fresh, 0)
    for alive in (0, 2, 2):  # round 0, and then after rounds of single clients of rank 2
        start = method.broadcast(state, profile(1))
        for name, pair in start.layout.unflatten(start.vector).layers.items():
            assert torch.equal(pair.A[alive:], fresh.layers[name].A[alive:])
            assert not pair.B[:, alive:].any()
            assert (pair.B[:, :alive].norm(dim=0) > 0).all()
        state, _ = play(method, state, [profile(2)], training(4))


def test_long_stacks_and_ranks_over_the_layers_size(play, random_adapter):
    """Past min(out, in) the sum is a matrix; a layer narrower than a client's rank has its ranks padded."""
    method = FlexLoRA()
    state = method.init(random_adapter({"narrow": (3, 9)}, 6, 1.0, 0), 0)
    clients = [Profile(k, 6, 1.0) for k in range(4)]
    state, updates = play(method, state, clients, training(5))
    close(state.layers["narrow"], sum(product(u, "narrow", True) for u in updates) / 4)
    start = method.broadcast(state, clients[0])
    pair = start.layout.unflatten(start.vector).layers["narrow"]
    close(pair, dense(state.layers["narrow"]))
    assert torch.equal(pair.A[3:], state.extras["A.narrow"][3:])
