"""Nested ranks: what HetLoRA and RBLA share. Rank j of every client is rank j of the global factors.

The state holds factors of the largest rank under one scale s. A client of rank r and scale s_k starts from the first r
ranks. When its changes dB_k and dA_k return, they count under the global scale again:

    down    B_k = (s / s_k) B[:, :r],   A_k = A[:r]         so s_k B_k A_k is the first r ranks of the global product
    up      (s_k / s) dB_k,  dA_k

The scales of clients differ (s_k = alpha / r_k), and a mean of factors must not ignore that. To put the ratio into B is
our choice. The server sums changes, not values. So an entry that a sparse download left out counts as unmoved; if
everything arrived, both sums are the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import rescale
from rayfed.methods import HeadMean, LayerMethod, LayerState, Profile, Start, Update
from rayfed.methods._means import positive


class Nested(LayerMethod):
    """State and download of methods that cut factors to their first ranks."""

    mixed_ranks = True

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        rows = {f"A.{name}": pair.A for name, pair in adapter.layers.items()}
        return LayerState(layers=dict(adapter.layers), head=dict(adapter.head), extras=rows)

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        return Start.of(nested(state, self.rank(state, client), client.scale))

    def rank(self, state: LayerState, client: Profile) -> int:
        """How many ranks the client gets."""
        return client.rank


def nested(state: LayerState, rank: int, scale: float, factor: Literal["B", "A"] = "B") -> Adapter:
    """The global factors, cut to their first ``rank`` ranks and under another scale, with the global head.

    The ratio of the scales goes into ``factor``.
    """
    pairs = {name: rescale(pair, scale) for name, pair in state.pairs.items()}
    if factor == "A":
        pairs = {n: LowRank(p.B.detach(), p.A.detach() * (p.scale / scale), scale) for n, p in state.pairs.items()}
    layers = {name: LowRank(pair.B[:, :rank], pair.A[:rank], scale) for name, pair in pairs.items()}
    return Adapter(layers, state.head)


class RankwiseMean(HeadMean):
    """Weighted sums of the clients' changes, rank by rank, and the weight of the clients that own each rank."""

    def __init__(self, state: LayerState) -> None:
        super().__init__()
        pairs = state.pairs.items()
        self._scales = {name: pair.scale for name, pair in pairs}
        self._B = {name: torch.zeros(pair.B.shape, dtype=torch.float64) for name, pair in pairs}
        self._A = {name: torch.zeros(pair.A.shape, dtype=torch.float64) for name, pair in pairs}
        self._owned = {name: torch.zeros(pair.rank, dtype=torch.float64) for name, pair in pairs}

    def add(self, weight: float, update: Update) -> None:
        """Counts one client, and adds ``weight`` times its changes of the factors."""
        self.count(weight, update)
        for name, pair in update.moved.layers.items():
            self._B[name][:, : pair.rank] += weight * pair.scale / self._scales[name] * pair.B
            self._A[name][: pair.rank] += weight * pair.A
            self._owned[name][: pair.rank] += weight

    def means(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's mean changes of B (out, r) and of A (r, in), and q (r,), all float64.

        A client that lacks a rank counts there as zero. q_j is the share of the weight that owns rank j. ValueError if
        no weight is positive.
        """
        total = positive(self.weight)
        return self._B[name] / total, self._A[name] / total, self._owned[name] / total
