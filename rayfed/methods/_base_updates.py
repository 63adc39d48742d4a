"""What methods share that merge something into the base in every round: fresh factors, and what clients must merge."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.seeding import torch_rng


def fresh_A(seed: int, layer: str, t: int, rank: int, inner: int) -> Tensor:
    """A layer's A (rank, inner) for round t, uniform in +-1/sqrt(inner), as `fresh_adapter` draws it.

    Draw the largest rank and cut: only then do smaller ranks have the first rows of the larger ones.
    """
    bound = 1 / math.sqrt(inner)
    return torch.empty(rank, inner).uniform_(-bound, bound, generator=torch_rng(seed, "lora.A", layer, t))


def initial_factors(adapter: Adapter) -> dict[str, LowRank]:
    """What clients must merge before the first round, by layer (scale 1); empty where the adapter changes nothing."""
    if not any(bool(pair.B.any()) for pair in adapter.layers.values()):
        return {}
    return {name: LowRank((pair.scale * pair.B).float(), pair.A.float(), 1.0) for name, pair in adapter.layers.items()}


def flat(factors: Mapping[str, LowRank]) -> Tensor:
    """B, then A, of every layer by name, as one float32 vector: what a client merges, layer by layer (scale 1)."""
    tensors = [tensor for name in sorted(factors) for tensor in (factors[name].B, factors[name].A)]
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors]) if tensors else torch.zeros(0)


def ranks_report(factors: Mapping[str, LowRank]) -> dict[str, float]:
    """The ranks of what is sent to every client: their mean and the largest."""
    ranks = [pair.rank for pair in factors.values()] or [0]
    return {"base_update_rank_mean": sum(ranks) / len(ranks), "base_update_rank_max": float(max(ranks))}
