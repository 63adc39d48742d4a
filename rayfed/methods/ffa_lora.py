"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays as it was drawn and only B trains, so the mean of factors is exact.

    B <- sum_k p_k B_k,   A = A_0   =>   s B A_0 = sum_k p_k s B_k A_0

Only B and the head travel, r out entries a layer both ways; A_0 comes from the run's seed. No options.

Mixed ranks are nested. Client k has the first r_k rows of A_0 and, under its own scale s_k, the first columns of B:

    down    B_k = (s / s_k) B[:, :r_k]                              its product is s B[:, :r_k] A_0[:r_k]
    B     <- advance(B, sum_k p_k (s_k / s) [dB_k | 0])             dB_k: its change of what it decoded

That moves ``s B A_0`` by exactly ``sum_k p_k s_k dB_k A_0[:r_k]``. Because changes are averaged, not values, B keeps
its entries where a client has no rank or received nothing. With equal ranks and dense downloads it is the equation
above. A_0 never changes, so B's entries mean the same in every round and any server optimizer may act on them.

Source: secondary; deviates: nothing known for equal ranks; nested ranks are ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from rayfed.methods import HeadMean, LayerMethod, LayerState
from rayfed.methods._nested_ranks import nested
from rayfed.methods.base import ANY_OPTIMIZER, Advance, Profile, Start, Trainable, Updates, fedavg


class FFALoRA(LayerMethod):
    """Freeze A, average B. No options."""

    paper = "arXiv 2403.12313"
    summary = "A frozen and shared; average B"
    traffic_down = traffic_up = "r_k out"
    source = "secondary"
    refuses_adapter: ClassVar[str] = "A is drawn from the seed and never travels"
    optimizers: ClassVar[tuple[str, ...]] = ANY_OPTIMIZER
    mixed_ranks = True
    secure_aggregation = True
    summed = "changes"
    mixing: ClassVar[Literal["exact"] | None] = "exact"

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        return Start.of(nested(state, client.rank, client.scale), "A")

    def trainable(self, state: LayerState, client: Profile) -> Trainable:
        return Trainable(parts=("B", "head"))

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        pairs, mean = state.pairs, HeadMean()
        sums = {name: torch.zeros(pair.B.shape, dtype=torch.float64) for name, pair in pairs.items()}
        for update in updates:
            mean.count(update.weight, update)
            for name, own in update.moved.layers.items():
                sums[name][:, : own.rank] += update.weight * own.scale / pairs[name].scale * own.B.double()
        head_change = mean.head()
        layers = {
            name: replace(pair, B=advance(f"B.{name}", pair.B, (sums[name] / mean.weight).float()))
            for name, pair in pairs.items()
        }
        return state.next_with_head(advance, head_change, layers=layers)
