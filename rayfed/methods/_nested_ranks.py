"""Nested ranks: what HetLoRA and RBLA share. Rank j of every client is rank j of the global factors.

The state holds factors of the largest rank under one scale s. A client of rank r and scale s_k starts from the first r
ranks, and its factors count under the global scale again when they return:

    down    B_k = (s / s_k) B[:, :r],   A_k = A[:r]         so that s_k B_k A_k is the global product's first r ranks
    up      (s_k / s) dB_k,  dA_k                           dB_k, dA_k: its changes of what it decoded

Scales differ by design (s_k = alpha / r_k), and a mean of factors that ignores them is wrong; carrying the ratio in B
is this project's choice. Changes, not values, are summed, so that an entry that a sparse download left out counts as
unmoved; where everything arrived both are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import rescale
from rayfed.methods._state import Global, Layered, ProductMean, first_ranks, pairs
from rayfed.methods.base import Profile, Start, Update


class Nested(Layered):
    """State and download of methods that cut factors to the first ranks."""

    mixed_ranks = True

    def init(self, adapter: Adapter, seed: int) -> Global:
        rows = {f"A.{name}": pair.A for name, pair in adapter.layers.items()}
        return Global(dict(adapter.layers), dict(adapter.head), extras=rows)

    def broadcast(self, state: Global, client: Profile) -> Start:
        rank, scale = self.rank(state, client), client.scale
        layers = {name: first_ranks(rescale(pair, scale), rank, scale) for name, pair in pairs(state).items()}
        adapter = Adapter(layers, state.head)
        return Start(adapter.flatten(), adapter.layout)

    def rank(self, state: Global, client: Profile) -> int:
        """How many ranks the client gets."""
        return client.rank

    def delta(self, state: Global, layer: str) -> LowRank | Tensor:
        return state.layers[layer]


class RankwiseMean:
    """Weighted sums of the clients' changes, rank by rank, and the weight of those who own each rank."""

    def __init__(self, state: Global) -> None:
        self._B: dict[str, Tensor] = {}
        self._A: dict[str, Tensor] = {}
        self._owned: dict[str, Tensor] = {}
        self._scales = {name: pair.scale for name, pair in pairs(state).items()}
        for name, pair in pairs(state).items():
            self._B[name] = torch.zeros(pair.B.shape, dtype=torch.float64)
            self._A[name] = torch.zeros(pair.A.shape, dtype=torch.float64)
            self._owned[name] = torch.zeros(pair.rank, dtype=torch.float64)
        self._heads = ProductMean()

    def add(self, weight: float, update: Update) -> None:
        change = update.layout.unflatten(update.change)
        self._heads.add(weight, Adapter({}, change.head))
        for name, pair in change.layers.items():
            self._B[name][:, : pair.rank] += weight * pair.scale / self._scales[name] * pair.B
            self._A[name][: pair.rank] += weight * pair.A
            self._owned[name][: pair.rank] += weight

    def head(self) -> dict[str, Tensor]:
        """The head's mean change. ValueError where no weight was added."""
        return self._heads.head()

    def means(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's mean changes of B (out, r) and A (r, in), where whoever lacks a rank counts as zero, and q (r,).

        q_j is the share of the weight that owns rank j. All float64.
        """
        whole = self._heads.weight
        return self._B[name] / whole, self._A[name] / whole, self._owned[name] / whole
