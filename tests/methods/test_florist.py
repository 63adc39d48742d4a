"""FLoRIST against a dense float64 SVD of the mean of products, cut by energy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_oracles import training

from rayfed.methods import Profile
from rayfed.methods.florist import FLoRIST

SHAPES = {"wide": (4, 9), "tall": (7, 5)}
COHORTS = [
    [Profile(0, 4, 2.0, examples=3), Profile(1, 1, 8.0, examples=1), Profile(2, 2, 4.0, examples=5)],
    [Profile(3, 2, 4.0, density_up=0.3, examples=2), Profile(1, 1, 8.0, examples=1)],
    [Profile(5, 4, 2.0, examples=7)],
]


def dense(pair):
    return (pair.scale * pair.B.double() @ pair.A.double()).numpy()


def mean_of_products(updates, layer):
    total = sum(u.weight for u in updates)
    return sum(u.weight / total * dense(u.trained.layers[layer]) for u in updates)


def cut_by_energy(D, tau):
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    p = next(p for p in range(1, len(S) + 1) if sum(S[:p] ** 2) >= tau * sum(S**2) * (1 - 1e-12))
    return p, (U[:, :p] * S[:p]) @ Vh[:p]


def relative(ours, theirs):
    return np.linalg.norm(ours.double().numpy() - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.99, 1.0])
def test_base_gains_the_leading_part_of_the_mean(play, random_adapter, tau):
    method, start, train = FLoRIST(tau=tau), random_adapter(SHAPES, 4, 2.0, seed=1), training(2)
    state = method.init(start, seed=7)
    W = {name: dense(pair) for name, pair in start.layers.items()}
    for cohort in COHORTS:
        state, updates = play(method, state, cohort, train)
        for i, name in enumerate(sorted(SHAPES)):
            D = mean_of_products(updates, name)
            p, kept = cut_by_energy(D, tau)
            W[name] += kept
            assert relative(method.delta(state, name), W[name]) < 1e-6
            assert tau == 1 or method.base_update(state)[i] == p  # at 1, singular values of rounding may come along
            assert tau < 1 or np.allclose(kept, D)


def test_base_is_the_sum_of_the_news(play, random_adapter):
    method, train = FLoRIST(tau=0.9), training(3)
    state = method.init(random_adapter(SHAPES, 4, 2.0, seed=1), seed=7)
    for cohort in COHORTS:
        before = {name: W.clone() for name, W in state.base.items()}
        state, _ = play(method, state, cohort, train)
        news = method.base_update(state)
        ranks, rest = news[: len(SHAPES)].int().tolist(), news[len(SHAPES) :]
        for name, p in zip(sorted(SHAPES), ranks):
            out, inner = SHAPES[name]
            B, A, rest = rest.split([out * p, p * inner, rest.numel() - p * (out + inner)])
            assert torch.equal(before[name].addmm(B.view(out, p).clone(), A.view(p, inner).clone()), state.base[name])
        assert rest.numel() == 0


def test_a_small_share_of_energy_sends_less(play, random_adapter):
    sizes = []
    for tau in (0.5, 0.99, 1.0):
        method = FLoRIST(tau=tau)
        state, _ = play(method, method.init(random_adapter(SHAPES, 4, 2.0, seed=1), seed=7), COHORTS[0], training(4))
        sizes.append(method.base_update(state).numel())
    assert sizes[0] < sizes[1] < sizes[2]


def test_without_local_training_nothing_moves_and_nothing_is_sent(play, random_adapter):
    method = FLoRIST()
    first = method.init(random_adapter(SHAPES, 4, 2.0, seed=1), seed=7)
    state, _ = play(method, first, COHORTS[0])
    assert all(torch.equal(method.delta(state, name), method.delta(first, name)) for name in SHAPES)
    assert torch.equal(method.base_update(state), torch.zeros(len(SHAPES)))
    state, _ = play(method, state, COHORTS[1], training(5))
    assert all(not torch.equal(method.delta(state, name), method.delta(first, name)) for name in SHAPES)
