"""Fed-TaLoRA is FedEx-LoRA, bit for bit."""

from __future__ import annotations

import torch

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


def test_a_run_is_fedex_bit_for_bit(play, random_adapter):
    ours, fedex = FedTaLoRA(rank_cap=3), FedExLoRA(rank_cap=3)
    one, two = (m.init(random_adapter(SHAPES, 2, 2.5, seed=1), seed=7) for m in (ours, fedex))
    for seed in (2, 3):
        one, _ = play(ours, one, COHORT, task(seed))
        two, _ = play(fedex, two, COHORT, task(seed))
        assert torch.equal(ours.base_update(one), fedex.base_update(two))
    assert all(torch.equal(tensor, two.tensors()[name]) for name, tensor in one.tensors().items())
