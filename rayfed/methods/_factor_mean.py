"""Means of factors: what FedIT, FLASC and related methods share.

The state is the global adapter as one flat vector P (n,). Clients upload changes, and the server averages them:

    P <- advance(P, sum_k p_k (P_k - P))

With the plain server step that is the mean of the factors, ``sum_k p_k P_k``. Any server optimizer may act on P. All
clients have one rank, so entry i means the same for every client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods._state import FactorState
from rayfed.methods.base import ANY_OPTIMIZER, Advance, Method, Profile, Start, Updates, fedavg, mean_change


class FactorMean(Method):
    """The mean of factors. A subclass says what is sent and what trains."""

    optimizers: ClassVar[tuple[str, ...]] = ANY_OPTIMIZER
    state_class = FactorState

    def init(self, adapter: Adapter, seed: int) -> FactorState:
        return FactorState(adapter.flatten(), adapter.layout)

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        return Start(state.vector, state.layout)

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        return state.next(vector=advance("vector", state.vector, mean_change(updates, state.layout.size)))

    def delta(self, state: FactorState, layer: str) -> LowRank:
        return state.layout.unflatten(state.vector).layers[layer]

    def head(self, state: FactorState) -> Mapping[str, Tensor]:
        return state.layout.unflatten(state.vector).head

    def layers(self, state: FactorState) -> tuple[str, ...]:
        return tuple(state.layout.scales)
