"""FedEx-LoRA against the paper's equation in dense float64: factor means, and the residual in the base."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_oracles import training

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import Profile
from rayfed.methods.fedex_lora import FedExLoRA

SHAPES = {"wide": (6, 11), "tall": (9, 7)}
SCALE = 2.5
COHORTS = [
    [Profile(0, 2, SCALE, examples=3), Profile(1, 2, SCALE, examples=1), Profile(2, 2, SCALE, examples=5)],
    [Profile(3, 2, SCALE, density_up=0.3, examples=2), Profile(1, 2, SCALE, examples=1)],
    [Profile(5, 2, SCALE, examples=7)],
]


def begun(random_adapter, zero):
    adapter = random_adapter(SHAPES, 2, SCALE, seed=1)
    if not zero:
        return adapter
    layers = {name: LowRank(torch.zeros_like(p.B), p.A, p.scale) for name, p in adapter.layers.items()}
    return Adapter(layers, adapter.head)


def averages(updates, layer):
    """(Bbar, Abar, D) of one layer, without the scale."""
    total = sum(u.weight for u in updates)
    mine = [(u.weight / total, u.trained.layers[layer]) for u in updates]
    Bs, As = [(p, c.B.double().numpy()) for p, c in mine], [(p, c.A.double().numpy()) for p, c in mine]
    D = sum(p * B @ A for (p, B), (_, A) in zip(Bs, As))
    return sum(p * B for p, B in Bs), sum(p * A for p, A in As), D


def best(W, rank):
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def relative(ours, theirs):
    return np.linalg.norm(ours.double().numpy() - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("rank_cap", [None, 1, 3, 100])
def test_residual_goes_into_the_base(play, random_adapter, zero, rank_cap):
    method, start, train = FedExLoRA(rank_cap=rank_cap), begun(random_adapter, zero), training(2)
    state = method.init(start, seed=7)
    base = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    head = start.head["head.weight"].double().numpy()
    for cohort in COHORTS:
        state, updates = play(method, state, cohort, train)
        total = sum(u.weight for u in updates)
        head = sum(u.weight / total * u.trained.head["head.weight"].double().numpy() for u in updates)
        for name in SHAPES:
            Bbar, Abar, D = averages(updates, name)
            residual = SCALE * (D - Bbar @ Abar)
            base[name] += residual if rank_cap is None else best(residual, rank_cap)
            assert relative(state.layers[name].B, Bbar) < 1e-6
            assert relative(state.layers[name].A, Abar) < 1e-6
            assert relative(method.delta(state, name), base[name] + SCALE * Bbar @ Abar) < 1e-6
        assert relative(method.head(state)["head.weight"], head) < 1e-6


def test_nothing_is_lost(play, random_adapter):
    """The change of the whole model in each round is the mean of the clients' changes of it."""
    method, train = FedExLoRA(), training(3)
    state = method.init(begun(random_adapter, False), seed=7)
    for cohort in COHORTS:
        before = {name: method.delta(state, name).double().numpy() for name in SHAPES}
        base = {name: W.double().numpy() for name, W in state.base.items()}
        state, updates = play(method, state, cohort, train)
        for name in SHAPES:
            learned = base[name] + SCALE * averages(updates, name)[2] - before[name]
            assert relative(method.delta(state, name) - torch.from_numpy(before[name]), learned) < 1e-6


@pytest.mark.parametrize("rank_cap", [None, 3])
def test_base_is_the_sum_of_the_news(play, random_adapter, rank_cap):
    method, train = FedExLoRA(rank_cap=rank_cap), training(4)
    state = method.init(begun(random_adapter, False), seed=7)
    assert method.base_update(state) is None
    for cohort in COHORTS:
        before = {name: W.clone() for name, W in state.base.items()}
        state, _ = play(method, state, cohort, train)
        news, rank = method.base_update(state), min(2 * (len(cohort) - 1), rank_cap or 100)
        assert news.shape == (rank * sum(out + inner for out, inner in SHAPES.values()),)
        at = 0
        for name in sorted(SHAPES):
            out, inner = SHAPES[name]
            B = news[at : at + out * rank].view(out, rank)
            A = news[at + out * rank : at + (out + inner) * rank].view(rank, inner)
            at += (out + inner) * rank
            assert torch.equal(before[name].addmm(B.clone(), A.clone()), state.base[name])


def test_report_says_what_a_cap_loses(play, random_adapter):
    reports = {}
    for rank_cap in (None, 1, 3):
        method = FedExLoRA(rank_cap=rank_cap)
        state, updates = play(method, method.init(begun(random_adapter, False), seed=7), COHORTS[0], training(5))
        reports[rank_cap] = state.report
    residuals = [SCALE * (D - B @ A) for B, A, D in (averages(updates, name) for name in SHAPES)]
    lost = np.sqrt(sum(np.linalg.norm(W - best(W, 1)) ** 2 for W in residuals))
    assert reports[None]["residual_norm"] == pytest.approx(np.sqrt(sum(np.linalg.norm(W) ** 2 for W in residuals)))
    assert reports[None]["residual_lost"] == 0.0
    assert reports[1]["residual_lost"] == pytest.approx(lost, rel=1e-5)
    assert 0 < reports[3]["residual_lost"] < lost
