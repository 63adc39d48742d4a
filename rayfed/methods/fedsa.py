"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A is shared; B and the head stay with each client for ever.

    A <- sum_k p_k A_k,   p_k ~ n_k        averaged and sent, r in entries a layer both ways
    B_k, head_k                            trained together with A; never sent, never averaged

A client starts a round from the global A and its own B_k and head_k, as its last round left them. Before its first
round they are those of the initial adapter, the same for all clients. The server optimizer moves only A. The simulator
stores B_k and head_k of every client that took part, in `state.clients`.

There is no single global model. The method's own metric is the mean over clients of what each client's own model
achieves. Evaluation and export of one model use a stand-in: the global A, with the plain mean of B and of the head over
the clients that took part so far (the initial ones before any did). No options.

Source: secondary; deviates: the stand-in is ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import Advance, ChangeMean, FactorMean, FactorState, Profile, Start, Trainable, Updates, fedavg

PERSONAL = ("B", "head")


class FedSA(FactorMean):
    """Average A only. The state's vector holds the global A, and the initial B and head, which never change."""

    paper = "arXiv 2410.01463"
    summary = "average A; B and the head stay with the client"
    traffic_down = traffic_up = "r in"
    source = "secondary"
    refuses_adapter = "B and the head are each client's own and never travel"
    personal = True
    secure_aggregation = True
    refuses_privacy = "the model that it exports has a mean of the clients' own B and heads, which gets no noise"

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        return Start.of(self.own(state, client.client), *PERSONAL)

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(personal=PERSONAL)

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        mean, clients = ChangeMean(state.layout.size), dict(state.clients)
        for update in updates:
            assert update.personal_values is not None
            mean.add(update)
            own = _personal(update.layout.unflatten(update.personal_values))
            clients[update.client.client] = {name: tensor.clone() for name, tensor in own.items()}
        shared, vector = state.layout.mask("A"), state.vector.clone()
        vector[shared] = advance("A", vector[shared], mean.mean()[shared])
        return state.next(vector=vector, clients=clients, report={"clients_seen": float(len(clients))})

    def own(self, state: FactorState, client: int) -> Adapter:
        """The client's own model: the global A with its B and head, or the initial ones. In storage of its own."""
        adapter = state.layout.unflatten(state.vector.clone())
        if client in state.clients:
            for name, tensor in _personal(adapter).items():
                tensor.copy_(state.clients[client][name])
        return adapter

    def delta(self, state: FactorState, layer: str) -> LowRank:
        shared = super().delta(state, layer)
        return LowRank(_mean(state, f"B.{layer}", shared.B), shared.A, shared.scale)

    def head(self, state: FactorState) -> Mapping[str, Tensor]:
        return {name: _mean(state, f"head.{name}", first) for name, first in super().head(state).items()}


def _personal(adapter: Adapter) -> dict[str, Tensor]:
    """B of every layer and the head, by stored name."""
    factors = {f"B.{name}": pair.B for name, pair in adapter.layers.items()}
    return factors | {f"head.{name}": tensor for name, tensor in adapter.head.items()}


def _mean(state: FactorState, key: str, first: Tensor) -> Tensor:
    """The plain mean of a personal tensor over the clients that took part, by id; ``first`` if no client did."""
    if not state.clients:
        return first
    total = torch.zeros(first.shape, dtype=torch.float64)
    for client in sorted(state.clients):
        total += state.clients[client][key]
    return (total / len(state.clients)).float()
