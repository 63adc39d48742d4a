"""FedHL against its equations on dense float64 matrices, and its laws."""

from __future__ import annotations

import pytest
import torch
from method_oracles import close, dense, product, training, truncation

from rayfed.lora.adapter import Adapter, LowRank, fresh_adapter
from rayfed.methods.base import Profile
from rayfed.methods.fedhl import FedHL

SHAPES = {"tall": (7, 5), "a.wide": (4, 9)}
RANKS = (1, 4, 2, 4, 1)


def profile(k, **more):
    return Profile(k, RANKS[k], 6 / RANKS[k], examples=3 + 2 * k, **more)


ROUNDS = ([0, 1, 2], [4, 2], [3], [1, 2, 0, 4])


def shares(W, updates, gamma, data):
    """p_i from the definition."""
    raw = []
    for update in updates:
        error = sum((W[name] - truncation(W[name], update.client.rank)).square().sum() for name in W)
        raw.append((update.client.examples if data == "examples" else 1) / (error**gamma + 1e-6))
    return [float(p / sum(raw)) for p in raw]


def begin(random_adapter, kind):
    if kind == "random":
        return random_adapter(SHAPES, 4, 1.5, 0)
    return fresh_adapter(SHAPES, {"head.weight": torch.ones(3, 5)}, 4, 1.5, 0)


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize(("gamma", "data"), [(2.0, "ignore"), (1.0, "examples"), (0.0, "ignore")])
@pytest.mark.parametrize(("density", "split"), [({}, "sqrt"), ({"density_down": 0.5, "density_up": 0.3}, "b")])
def test_agrees_with_the_equations(play, random_adapter, kind, gamma, data, density, split):
    method = FedHL(gamma=gamma, data=data, split=split)
    start = begin(random_adapter, kind)
    state = method.init(start, 0)
    W = {name: dense(start.layers[name]) for name in SHAPES}
    head, train = start.head["head.weight"].double(), training(1)
    for members in ROUNDS:
        state, updates = play(method, state, [profile(k, **density) for k in members], train)
        p = shares(W, updates, gamma, data)
        for name in W:
            W[name] = W[name] + sum(
                share * (product(u, name, True) - product(u, name, False)) for share, u in zip(p, updates)
            )
            close(method.delta(state, name), W[name])
        head = head + sum(s * u.layout.unflatten(u.change).head["head.weight"].double() for s, u in zip(p, updates))
        close(method.head(state)["head.weight"], head)
        assert state.report["weights_max"] == pytest.approx(max(p), rel=1e-5)
        assert state.report["effective_cohort"] == pytest.approx(1 / sum(s**2 for s in p), rel=1e-5)


def test_a_client_starts_from_the_best_approximation_of_its_rank(play, random_adapter):
    for split in ("b", "sqrt"):
        method = FedHL(split=split)
        state, _ = play(
            method, method.init(begin(random_adapter, "random"), 0), [profile(k) for k in range(5)], training(2)
        )
        for client in map(profile, range(3)):
            start = method.broadcast(state, client)
            for name, pair in start.layout.unflatten(start.vector).layers.items():
                assert pair.scale == client.scale
                close(pair, truncation(dense(state.layers[name]), client.rank))
                if split == "sqrt":
                    torch.testing.assert_close(pair.B.norm(dim=0), pair.A.norm(dim=1))


@pytest.mark.parametrize("down", [1.0, 0.5])
def test_without_training_nothing_moves_to_the_bit(play, random_adapter, down):
    method = FedHL()
    state, _ = play(
        method, method.init(begin(random_adapter, "random"), 0), [profile(k) for k in range(5)], training(3)
    )
    after = state
    for members in ROUNDS:
        after, _ = play(method, after, [profile(k, density_down=down) for k in members])
    for name in SHAPES:
        assert torch.linalg.matrix_rank(state.layers[name]) == min(SHAPES[name])  # every client is truncated
        assert torch.equal(after.layers[name], state.layers[name])
    assert torch.equal(after.head["head.weight"], state.head["head.weight"])


def test_with_enough_rank_it_is_the_mean_of_products(play, random_adapter):
    method, clients = FedHL(data="examples"), [Profile(k, 3, 2.0, examples=k + 1) for k in range(4)]
    low = random_adapter(SHAPES, 1, 1.0, 5)  # W has rank 1; the largest rank is 4
    fresh = begin(random_adapter, "fresh")
    layers = {
        name: LowRank(torch.cat([low.layers[name].B, torch.zeros(SHAPES[name][0], 3)], 1), pair.A, 1.0)
        for name, pair in fresh.layers.items()
    }
    state, updates = play(method, method.init(Adapter(layers, fresh.head), 0), clients, training(4))
    for name in SHAPES:
        close(state.layers[name], sum((k + 1) / 10 * product(u, name, True) for k, u in enumerate(updates)))


def test_equal_ranks_add_what_truncation_left_out_to_the_mean_of_products(play, random_adapter):
    method, clients = FedHL(), [Profile(k, 2, 1.0) for k in range(3)]
    before = method.init(begin(random_adapter, "random"), 0)
    after, updates = play(method, before, clients, training(5))
    for name in SHAPES:
        W = dense(before.layers[name])
        mean = sum(product(u, name, True) for u in updates) / 3
        assert (W - truncation(W, 2)).norm() > 0.05 * W.norm()
        close(after.layers[name], mean + W - truncation(W, 2))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_weights_are_on_the_simplex_and_grow_with_rank(play, random_adapter, gamma):
    """Client i moves entry i of the head by 1: the head's change is the weights."""

    def train(client, start, adapter):
        head = adapter.head["head.weight"].clone()
        head.view(-1)[client.client] += 1
        return Adapter(adapter.layers, {"head.weight": head})

    method, clients = FedHL(gamma=gamma), [Profile(k, k + 1, 1.0, examples=9 - k) for k in range(4)]
    before = method.init(begin(random_adapter, "random"), 0)
    after, _ = play(method, before, clients, train)
    p = (after.head["head.weight"] - before.head["head.weight"]).view(-1)[:4]
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    assert p.min() >= 0
    assert torch.equal(p, p.sort().values)
    assert p[3] > p[0]


def penalties(method, W, updates):
    """What divides each client's weight, from the definitions in the docstring, in float64."""
    energy = sum(w.square().sum() for w in W.values())
    for update in updates:
        if method.error == "rank":
            arrived = {name: truncation(W[name], update.client.rank) for name in W}
        else:
            arrived = {name: product(update, name, False) for name in W}
        error = sum((W[name] - arrived[name]).square().sum() for name in W)
        if method.relative:
            yield float((error / energy + method.eps) ** method.gamma) if energy else 1.0
        else:
            yield float(error**method.gamma + method.eps)


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize("options", [{"relative": True}, {"error": "sent"}, {"relative": True, "error": "sent"}])
def test_relative_errors_and_errors_of_what_was_sent(play, random_adapter, kind, options):
    method = FedHL(gamma=1.5, eps=0.1, **options)
    start = begin(random_adapter, kind)
    state, W = method.init(start, 0), {name: dense(start.layers[name]) for name in SHAPES}
    for members in ROUNDS:
        cohort = [profile(k, density_down=0.5) for k in members]
        state, updates = play(method, state, cohort, training(8))
        p = [1 / penalty for penalty in penalties(method, W, updates)]
        for name in W:
            W[name] = W[name] + sum(
                share / sum(p) * (product(u, name, True) - product(u, name, False)) for share, u in zip(p, updates)
            )
            close(method.delta(state, name), W[name])


def test_relative_weights_do_not_depend_on_the_size_of_the_change(play, random_adapter):
    clients, start = [Profile(k, k + 1, 1.0) for k in range(4)], begin(random_adapter, "random")
    larger = {name: LowRank(30 * pair.B, pair.A, pair.scale) for name, pair in start.layers.items()}

    def weights_max(method, layers):
        state = method.init(Adapter(layers, start.head), 0)
        return play(method, state, clients, training(9))[0].report["weights_max"]

    relative, absolute = FedHL(gamma=1.0, relative=True, eps=0.1), FedHL(gamma=1.0, eps=0.1)
    assert weights_max(relative, larger) == pytest.approx(weights_max(relative, start.layers), rel=1e-4)
    assert weights_max(absolute, larger) > weights_max(absolute, start.layers) + 0.01


@pytest.mark.parametrize("data", ["ignore", "examples"])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_the_least_cohort_tempers_the_weights(play, random_adapter, data, share):
    clients = [Profile(k, k + 1, 1.0, examples=4 + k) for k in range(4)]
    start = begin(random_adapter, "random")
    state, W = FedHL().init(start, 0), {name: dense(start.layers[name]) for name in SHAPES}
    method = FedHL(min_cohort=share, data=data)
    after, updates = play(method, state, clients, training(10))
    data_weights = [u.client.examples if data == "examples" else 1 for u in updates]
    alone = sum(data_weights) ** 2 / sum(d**2 for d in data_weights)
    plain, _ = play(FedHL(data=data), state, clients, training(10))
    assert plain.report["effective_cohort"] < 0.3 * alone  # the limit binds
    assert after.report["effective_cohort"] == pytest.approx(share * alone, rel=1e-4)
    power = after.report["weights_power"]
    raw = [d / penalty**power for d, penalty in zip(data_weights, penalties(method, W, updates))]
    assert after.report["weights_max"] == pytest.approx(max(raw) / sum(raw), rel=1e-4)


def test_a_least_cohort_that_is_met_changes_no_bit(play, random_adapter):
    clients, start = [Profile(k, 2 + k % 2, 1.0) for k in range(4)], begin(random_adapter, "random")
    state = FedHL().init(start, 0)
    plain, _ = play(FedHL(gamma=0.1), state, clients, training(11))
    limited, _ = play(FedHL(gamma=0.1, min_cohort=0.5), state, clients, training(11))
    assert all(torch.equal(plain.layers[name], limited.layers[name]) for name in SHAPES)
    assert limited.report["weights_power"] == 1.0


def test_any_server_optimizer_moves_the_matrix(play, random_adapter):
    seen = []

    def half(name, value, change):
        seen.append(name)
        return value + 0.5 * change

    method, state = FedHL(), FedHL().init(begin(random_adapter, "random"), 0)
    whole, _ = play(method, state, [profile(1)], training(6))
    stepped, _ = play(method, state, [profile(1)], training(6), advance=half)
    assert sorted(seen) == ["W.a.wide", "W.tall", "head.head.weight"]
    for name in SHAPES:
        close(stepped.layers[name], (dense(state.layers[name]) + dense(whole.layers[name])) / 2)


def test_round_zero_sends_the_shared_rows_and_no_rank_is_ever_dead(play, random_adapter):
    method, fresh = FedHL(), begin(random_adapter, "fresh")
    state, train = method.init(fresh, 0), training(7)
    for k in range(3):
        start = method.broadcast(state, profile(k))
        for name, pair in start.layout.unflatten(start.vector).layers.items():
            assert not pair.B.any()
            assert torch.equal(pair.A, fresh.layers[name].A[: RANKS[k]])
    state, _ = play(method, state, [profile(0)], train)  # W now has rank 2: rank 4 has dead ranks to pad
    start = method.broadcast(state, profile(1))
    for name, pair in start.layout.unflatten(start.vector).layers.items():
        assert torch.equal(pair.A[2:], fresh.layers[name].A[2:4])
        assert not pair.B[:, 2:].any()
        assert ((pair.B.norm(dim=0) > 0) | (pair.A.norm(dim=1) > 0)).all()
