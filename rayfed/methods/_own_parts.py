"""Methods in which parts of the adapter stay with each client for ever: what FedSA-LoRA and local training share.

The state's vector holds the initial values of these parts, which never change, and the global values of A where A is
shared. `state.clients` has the parts of every client that took part, as its last round left them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods._factor_mean import FactorMean
from rayfed.methods._means import Advance, ChangeMean, fedavg
from rayfed.methods._messages import Start, Trainable, Updates
from rayfed.methods._state import FactorState
from rayfed.profiles.profile import Profile


class OwnParts(FactorMean):
    """The mean of A, unless that is a client's own, too. A subclass names the parts that are: B, the head, or all.

    There is no single global model. `delta` and `head` give a stand-in for it: the plain mean of each part over the
    clients that took part so far; the initial one before any did.
    """

    own_parts: ClassVar[tuple[str, ...]]
    personal = True

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        return Start.of(self.own(state, client.client), *self.own_parts)

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(personal=self.own_parts)

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        mean, clients = ChangeMean(state.layout.size), dict(state.clients)
        for update in updates:
            assert update.personal_values is not None
            mean.add(update)
            own = self._own(update.layout.unflatten(update.personal_values))
            clients[update.client.client] = {name: tensor.clone() for name, tensor in own.items()}
        change, vector = mean.mean(), state.vector
        if "A" not in self.own_parts:
            shared, vector = state.layout.mask("A"), state.vector.clone()
            vector[shared] = advance("A", vector[shared], change[shared])
        return state.next(vector=vector, clients=clients, report={"clients_seen": float(len(clients))})

    def own(self, state: FactorState, client: int) -> Adapter:
        """The client's own model: the global A with its parts, or the initial ones. In storage of its own."""
        adapter = state.layout.unflatten(state.vector.clone())
        if client in state.clients:
            for name, tensor in self._own(adapter).items():
                tensor.copy_(state.clients[client][name])
        return adapter

    def delta(self, state: FactorState, layer: str) -> LowRank:
        pair = super().delta(state, layer)
        return LowRank(self._mean(state, f"B.{layer}", pair.B), self._mean(state, f"A.{layer}", pair.A), pair.scale)

    def head(self, state: FactorState) -> Mapping[str, Tensor]:
        return {name: self._mean(state, f"head.{name}", first) for name, first in super().head(state).items()}

    def _own(self, adapter: Adapter) -> dict[str, Tensor]:
        """The client's own factors and head, by stored name."""
        factors = {
            f"{part}.{name}": getattr(pair, part)
            for part in ("A", "B")
            if part in self.own_parts
            for name, pair in adapter.layers.items()
        }
        return factors | {f"head.{name}": tensor for name, tensor in adapter.head.items()}

    def _mean(self, state: FactorState, key: str, first: Tensor) -> Tensor:
        """The plain mean of a tensor over the clients that took part, by id; ``first`` if none did, or it is shared."""
        if not state.clients or key.split(".")[0] not in self.own_parts:
            return first
        total = torch.zeros(first.shape, dtype=torch.float64)
        for client in sorted(state.clients):
            total += state.clients[client][key]
        return (total / len(state.clients)).float()
