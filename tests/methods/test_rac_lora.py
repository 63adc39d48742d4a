"""RAC-LoRA against dense float64 sums: blocks, each over an A of its own, merged without loss."""

from __future__ import annotations

import pytest
import torch
from method_oracles import begun, dense, relative, training

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import Profile
from rayfed.methods.flora import fresh_A
from rayfed.methods.rac_lora import RACLoRA

SHAPES = {"wide": (4, 9), "tall": (7, 5)}
COHORTS = [
    [Profile(0, 4, 2.0, examples=3), Profile(1, 1, 8.0, examples=1), Profile(2, 2, 4.0, examples=5)],
    [Profile(3, 2, 4.0, density_up=0.3, examples=2), Profile(4, 4, 2.0, density_down=0.5, examples=1)],
    [Profile(5, 1, 3.0, examples=7)],
    [Profile(0, 4, 2.0, examples=3), Profile(5, 1, 3.0, examples=7)],
]


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("block_rounds", [1, 2, 3])
def test_model_moves_by_the_mean_of_what_clients_changed(play, random_adapter, zero, block_rounds):
    method, start, train = RACLoRA(block_rounds=block_rounds), begun(random_adapter, zero), training(2)
    state = method.init(start, seed=7)
    W = {name: dense(pair) for name, pair in start.layers.items()}
    head = start.head["head.weight"].double()
    for cohort in COHORTS:
        state, updates = play(method, state, cohort, train)
        total = sum(u.weight for u in updates)
        head += sum(u.weight / total * u.layout.unflatten(u.change).head["head.weight"].double() for u in updates)
        for name in SHAPES:
            W[name] += sum(
                u.weight / total * (dense(u.trained.layers[name]) - dense(u.sent.layers[name])) for u in updates
            )
            assert relative(method.delta(state, name), W[name]) < 1e-6
        assert relative(method.head(state)["head.weight"], head) < 1e-6


def test_a_block_of_one_round_merges_the_mean_of_products(play, random_adapter):
    method = RACLoRA()
    state = method.init(begun(random_adapter, True), seed=7)
    state, updates = play(method, state, COHORTS[0], training(3))
    for name in SHAPES:
        D = sum(u.weight / 9 * dense(u.trained.layers[name]) for u in updates)
        assert relative(state.base[name], D) < 1e-6


@pytest.mark.parametrize("block_rounds", [1, 2])
def test_blocks_open_afresh_and_close_with_news(play, random_adapter, block_rounds):
    method, train = RACLoRA(block_rounds=block_rounds), training(4)
    assert method.base_update(method.init(begun(random_adapter, True), seed=7)) is None
    state = method.init(begun(random_adapter, False), seed=7)
    for t, cohort in enumerate(COHORTS, start=1):
        before = state
        start = method.broadcast(before, Profile(0, 2, 4.0))
        opening = (t - 1) % block_rounds == 0
        assert torch.equal(start.known, start.layout.mask("A", "B") if opening else start.layout.mask("A"))
        assert start.base is before.base
        state, _ = play(method, before, cohort, train)
        news = method.base_update(state)
        if t % block_rounds:
            assert news is None
            assert all(torch.equal(state.base[name], before.base[name]) for name in SHAPES)
            assert all(torch.equal(state.layers[name].A, before.layers[name].A) for name in SHAPES)
            assert all(state.layers[name].B.any() for name in SHAPES)
            continue
        assert news.shape == (4 * sum(out for out, _ in SHAPES.values()),)
        at = 0
        for name in sorted(SHAPES):
            out, inner = SHAPES[name]
            B = news[at : at + out * 4].view(out, 4)
            at += out * 4
            assert torch.equal(before.base[name].addmm(B.clone(), before.layers[name].A), state.base[name])
            assert torch.equal(state.layers[name].A, fresh_A(7, name, t, 4, inner))
            assert not state.layers[name].B.any()
            assert state.layers[name].scale == 2.0


@pytest.mark.parametrize("block_rounds", [1, 2])
def test_ranks_are_nested_and_alive(play, random_adapter, block_rounds):
    method, train = RACLoRA(block_rounds=block_rounds), training(5)
    state = method.init(begun(random_adapter, False), seed=7)
    for cohort in COHORTS:
        for rank, scale in ((1, 8.0), (2, 4.0), (4, 0.3)):
            start = method.broadcast(state, Profile(0, rank, scale))
            for name, pair in start.layout.unflatten(start.vector).layers.items():
                whole = state.layers[name]
                assert pair.scale == scale
                assert torch.equal(pair.A, whole.A[:rank])
                assert bool((pair.A.norm(dim=1) > 0).all())
                first = LowRank(whole.B[:, :rank], whole.A[:rank], whole.scale)
                torch.testing.assert_close(dense(pair), dense(first), rtol=1e-6, atol=1e-6)
        state, _ = play(method, state, cohort, train)


def test_a_server_rate_scales_the_merged_change(play, random_adapter):
    method = RACLoRA()
    state = method.init(begun(random_adapter, True), seed=7)
    whole, _ = play(method, state, COHORTS[0], training(6))
    half, _ = play(method, state, COHORTS[0], training(6), advance=lambda name, value, change: value + 0.5 * change)
    for name in SHAPES:
        torch.testing.assert_close(method.delta(half, name), 0.5 * method.delta(whole, name))


@pytest.mark.parametrize("sketch", ["uniform", "orthonormal"])
@pytest.mark.parametrize("block_rounds", [1, 2])
def test_with_a_trained_the_model_moves_by_the_mean_of_what_clients_changed(play, random_adapter, block_rounds, sketch):
    method, start = RACLoRA(block_rounds=block_rounds, train="A", sketch=sketch), begun(random_adapter, False)
    state, train = method.init(start, seed=7), training(2)
    W = {name: dense(pair) for name, pair in start.layers.items()}
    for cohort in COHORTS:
        state, updates = play(method, state, cohort, train)
        assert all(u.layout.mask("B")[u.change != 0].sum() == 0 for u in updates)
        total = sum(u.weight for u in updates)
        for name in SHAPES:
            W[name] += sum(
                u.weight / total * (dense(u.trained.layers[name]) - dense(u.sent.layers[name])) for u in updates
            )
            assert relative(method.delta(state, name), W[name]) < 1e-6


def test_with_a_trained_a_block_ends_with_a_of_every_layer(play, random_adapter):
    method = RACLoRA(train="A")
    state = method.init(begun(random_adapter, True), seed=7)
    after, _ = play(method, state, COHORTS[0], training(4))
    news = method.base_update(after)
    assert news.shape == (4 * sum(inner for _, inner in SHAPES.values()),)
    name = min(SHAPES)
    A = news[: 4 * SHAPES[name][1]].view(4, -1)
    assert torch.equal(state.base[name].addmm(state.layers[name].B, A.clone()), after.base[name])
    assert not after.layers[name].A.any()
    assert not torch.equal(after.layers[name].B, state.layers[name].B)


@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_step_over_an_orthonormal_sketch_projects_the_gradient(play, random_adapter, train, rank):
    """Of the loss <G, s B A> one step of SGD at the rate eta / s^2 moves W by -eta G A^T A, or by -eta B B^T G."""
    eta, scale, g = 0.3, 8.0 / rank, torch.Generator().manual_seed(5)
    G = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}

    def step(client, start, adapter):
        layers = {}
        for name, pair in adapter.layers.items():
            B, A = pair.B.clone().requires_grad_(), pair.A.clone().requires_grad_()
            (G[name] * (scale * B @ A)).sum().backward()
            lr = eta / scale**2
            layers[name] = LowRank((B - lr * B.grad).detach(), (A - lr * A.grad).detach(), pair.scale)
        return Adapter(layers, adapter.head)

    method = RACLoRA(train=train, sketch="orthonormal")
    state = method.init(begun(random_adapter, True), seed=7)
    after, _ = play(method, state, [Profile(0, rank, scale)], step)
    for name, pair in state.pairs.items():
        Q = pair.A[:rank].T if train == "B" else pair.B[:, :rank]
        torch.testing.assert_close(Q.T @ Q, torch.eye(rank), rtol=0, atol=1e-6)
        wanted = -eta * (G[name] @ Q @ Q.T if train == "B" else Q @ Q.T @ G[name])
        torch.testing.assert_close(after.base[name], wanted, rtol=1e-4, atol=1e-5)
