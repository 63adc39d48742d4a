"""Fed-TaLoRA is FedEx's round on a sequence of tasks: nothing is lost, and nothing is reset where a task ends."""

from __future__ import annotations

import torch
from method_oracles import dense

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import Profile
from rayfed.methods.fed_talora import FedTaLoRA
from rayfed.methods.fedex_lora import FedExLoRA

SHAPES = {"wide": (6, 11), "tall": (9, 7)}
COHORT = [Profile(0, 2, 2.5, examples=3), Profile(1, 2, 2.5, examples=1), Profile(2, 2, 2.5, examples=5)]


def task(seed):
    """Local training towards whatever this task asks: a random move of every entry."""
    rng = torch.Generator().manual_seed(seed)

    def train(client, start, adapter):
        layers = {
            name: LowRank(
                p.B + torch.randn(p.B.shape, generator=rng), p.A + torch.randn(p.A.shape, generator=rng), p.scale
            )
            for name, p in adapter.layers.items()
        }
        return Adapter(layers, {name: t + torch.randn(t.shape, generator=rng) for name, t in adapter.head.items()})

    return train


def test_every_task_adds_the_mean_of_products(play, random_adapter):
    method = FedTaLoRA()
    state = method.init(random_adapter(SHAPES, 2, 2.5, seed=1), seed=7)
    for seed in (2, 3, 4):
        before = state
        state, updates = play(method, state, COHORT, task(seed))
        total = sum(u.weight for u in updates)
        for name in SHAPES:
            D = sum(u.weight / total * dense(u.trained.layers[name]) for u in updates)
            W = before.base[name].double() + D
            assert float((method.delta(state, name).double() - W).norm() / W.norm()) < 1e-6


def test_a_run_is_fedex_bit_for_bit(play, random_adapter):
    ours, fedex = FedTaLoRA(rank_cap=3), FedExLoRA(rank_cap=3)
    one, two = (m.init(random_adapter(SHAPES, 2, 2.5, seed=1), seed=7) for m in (ours, fedex))
    for seed in (2, 3):
        one, _ = play(ours, one, COHORT, task(seed))
        two, _ = play(fedex, two, COHORT, task(seed))
        assert torch.equal(ours.base_update(one), fedex.base_update(two))
    assert all(torch.equal(tensor, two.tensors()[name]) for name, tensor in one.tensors().items())
