"""RBLA against its equation on dense float64 factors, and its laws."""

from __future__ import annotations

import pytest
import torch
from method_oracles import close, training

from rayfed.lora.adapter import fresh_adapter
from rayfed.methods.base import Profile
from rayfed.methods.rbla import RBLA

SHAPES = {"tall": (7, 5), "a.wide": (4, 9)}
RANKS = (1, 4, 2, 4, 1)
ROUNDS = ([0, 1, 2], [4, 2], [3], [1, 2, 0, 4], [0])
SCALE = 1.5  # of the global factors


def profile(k, **more):
    return Profile(k, RANKS[k], 6 / RANKS[k], examples=3 + 2 * k, **more)


def begin(random_adapter, kind):
    if kind == "random":
        return random_adapter(SHAPES, 4, SCALE, 0)
    return fresh_adapter(SHAPES, {"head.weight": torch.ones(3, 5)}, 4, SCALE, 0)


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize("up", [1.0, 0.3])
def test_averages_each_index_over_its_owners(play, random_adapter, kind, up):
    method, train, start = RBLA(), training(1), begin(random_adapter, kind)
    state = method.init(start, 0)
    B = {name: pair.B.double() for name, pair in start.layers.items()}
    A = {name: pair.A.double() for name, pair in start.layers.items()}
    head = start.head["head.weight"].double()
    for members in ROUNDS:
        state, updates = play(method, state, [profile(k, density_up=up) for k in members], train)
        trained = [u.layout.unflatten(u.start.double() + u.change.double()) for u in updates]
        n = [u.client.examples for u in updates]
        for name in SHAPES:
            for j in range(4):
                owners = [(k, t.layers[name]) for k, t in zip(n, trained) if t.layers[name].rank > j]
                whole = sum(k for k, _ in owners)
                if owners:
                    B[name][:, j] = sum(k / whole * pair.scale / SCALE * pair.B[:, j] for k, pair in owners)
                    A[name][j] = sum(k / whole * pair.A[j] for k, pair in owners)
            close(method.delta(state, name), SCALE * B[name] @ A[name])
        head = sum(k / sum(n) * t.head["head.weight"] for k, t in zip(n, trained))
        close(method.head(state)["head.weight"], head)


def test_what_a_sparse_download_keeps_back_is_unmoved(play, random_adapter):
    method, start, clients = RBLA(), begin(random_adapter, "random"), [profile(k, density_down=0.5) for k in (1, 2)]
    state, updates = play(method, method.init(start, 0), clients, training(2))
    for name, pair in start.layers.items():
        B, A = pair.B.double(), pair.A.double()
        for j in range(4):
            owners = [u for u in updates if u.client.rank > j]
            for u in owners:
                change = u.layout.unflatten(u.change.double()).layers[name]
                share = u.client.examples / sum(v.client.examples for v in owners)
                B[:, j] += share * u.client.scale / SCALE * change.B[:, j]
                A[j] += share * change.A[j]
        close(state.layers[name], SCALE * B @ A)


def test_a_client_starts_from_the_first_ranks_of_the_product(random_adapter):
    method, start = RBLA(), begin(random_adapter, "random")
    for client in map(profile, range(3)):
        sent = method.broadcast(method.init(start, 0), client)
        for name, pair in sent.layout.unflatten(sent.vector).layers.items():
            assert (pair.rank, pair.scale) == (client.rank, client.scale)
            whole = start.layers[name]
            close(pair, SCALE * whole.B[:, : client.rank].double() @ whole.A[: client.rank].double())


@pytest.mark.parametrize("down", [1.0, 0.5])
def test_without_training_nothing_decays_to_the_bit(play, random_adapter, down):
    method = RBLA()
    first = state = method.init(begin(random_adapter, "random"), 0)
    for members in ROUNDS:
        state, _ = play(method, state, [profile(k, density_down=down) for k in members])
    assert all(torch.equal(state.tensors()[key], tensor) for key, tensor in first.tensors().items())


def test_an_index_nobody_owns_keeps_its_value_whatever_the_rate(play, random_adapter):
    method = RBLA()
    first = method.init(begin(random_adapter, "random"), 0)
    clients = [profile(2), profile(0)]
    after, _ = play(method, first, clients, training(3), advance=lambda name, value, change: value + 2 * change)
    plain, _ = play(method, first, clients, training(3))
    assert after.report["owned_least"] == 0.0
    for name, pair in first.layers.items():
        assert torch.equal(after.layers[name].B[:, 2:], pair.B[:, 2:])
        assert torch.equal(after.layers[name].A[2:], pair.A[2:])
        torch.testing.assert_close(after.layers[name].A - pair.A, 2 * (plain.layers[name].A - pair.A))
