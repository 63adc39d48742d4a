"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays as it was drawn and only B trains, so the mean of factors is exact.

    B <- sum_k p_k B_k,   A = A_0   =>   s B A_0 = sum_k p_k s B_k A_0

Only B and the head travel, r out entries a layer both ways; A_0 comes from the run's seed. The equations come from a
collection; the paper's own text was not at hand.

Mixed ranks are nested: client k has the first r_k rows of A_0 and, under its own scale s_k, the first columns of B:

    down    B_k = (s / s_k) B[:, :r_k]                              its product is s B[:, :r_k] A_0[:r_k]
    B     <- advance(B, sum_k p_k (s_k / s) [dB_k | 0])             dB_k: its change of what it decoded

which moves ``s B A_0`` by exactly ``sum_k p_k s_k dB_k A_0[:r_k]``. Averaging changes rather than values keeps what a
client does not own, or was not sent: with equal ranks and nothing sparse both are the equation above. As A_0 never
changes, B's entries mean the same in every round, and any server optimizer may act on them. No options.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import rescale
from rayfed.methods._state import Global, Layered, ProductMean, advance_head, first_ranks, pairs
from rayfed.methods.base import Advance, Profile, Start, Trainable, Update, fedavg


@dataclass(frozen=True)
class FFALoRA(Layered):
    """Freeze A, average B. No options."""

    optimizers: ClassVar[tuple[str, ...]] = ("fedavg", "sgd", "fedavgm", "fedadam", "adamw")
    mixed_ranks = True

    def init(self, adapter: Adapter, seed: int) -> Global:
        return Global(dict(adapter.layers), dict(adapter.head))

    def broadcast(self, state: Global, client: Profile) -> Start:
        layers = {
            name: first_ranks(rescale(pair, client.scale), client.rank, client.scale)
            for name, pair in pairs(state).items()
        }
        adapter = Adapter(layers, state.head)
        return Start(adapter.flatten(), adapter.layout, known=adapter.layout.mask("A"))

    def trainable(self, state: Global, client: Profile) -> Trainable:
        return Trainable(parts=("B", "head"))

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        now, heads = pairs(state), ProductMean()
        sums = {name: torch.zeros(pair.B.shape, dtype=torch.float64) for name, pair in now.items()}
        for update in updates:
            change = update.layout.unflatten(update.change)
            heads.add(update.weight, Adapter({}, change.head))
            for name, own in change.layers.items():
                share = update.weight * own.scale / now[name].scale
                sums[name][:, : own.rank] += share * own.B.double()
        head = advance_head(state.head, heads.head(), advance)
        layers = {
            name: replace(pair, B=advance(f"B.{name}", pair.B, (sums[name] / heads.weight).float()))
            for name, pair in now.items()
        }
        return replace(state, layers=layers, head=head, rounds=state.rounds + 1)

    def delta(self, state: Global, layer: str) -> LowRank | Tensor:
        return state.layers[layer]
