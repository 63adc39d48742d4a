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
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, Entry, Layout, LowRank
from rayfed.methods import Advance, ChangeMean, FactorMean, FactorState, Profile, Start, Trainable, Updates, fedavg

PERSONAL = ("B", "head")


@dataclass(frozen=True)
class FedSA(FactorMean):
    """Average A only. The state's vector holds the global A, and the initial B and head, which never change."""

    paper = "arXiv 2410.01463"
    summary = "average A; B and the head stay with the client"
    traffic_down = traffic_up = "r in"
    source = "secondary"
    personal = True

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        return Start.of(self.own(state, client.client), *PERSONAL)

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(personal=PERSONAL)

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        mean, clients = ChangeMean(state.layout.size), dict(state.clients)
        for update in updates:
            if update.personal_values is None:
                raise ValueError(f"the update of client {update.client.client} lacks its personal parts")
            mean.add(update)
            clients[update.client.client] = {
                f"{entry.part}.{entry.name}": _part(update.personal_values, entry).clone()
                for entry in _personal(update.layout)
            }
        shared, vector = state.layout.mask("A"), state.vector.clone()
        vector[shared] = advance("A", vector[shared], mean.mean()[shared])
        return state.next(vector=vector, clients=clients, report={"clients_seen": float(len(clients))})

    def own(self, state: FactorState, client: int) -> Adapter:
        """The client's own model: the global A with its B and head, or the initial ones. In storage of its own."""
        vector = state.vector.clone()
        if client in state.clients:
            for entry in _personal(state.layout):
                _part(vector, entry).copy_(state.clients[client][f"{entry.part}.{entry.name}"])
        return state.layout.unflatten(vector)

    def delta(self, state: FactorState, layer: str) -> LowRank:
        shared = super().delta(state, layer)
        return LowRank(_mean(state, f"B.{layer}", shared.B), shared.A, shared.scale)

    def head(self, state: FactorState) -> Mapping[str, Tensor]:
        return {name: _mean(state, f"head.{name}", first) for name, first in super().head(state).items()}


def _personal(layout: Layout) -> list[Entry]:
    return [entry for entry in layout.entries if entry.part in PERSONAL]


def _part(vector: Tensor, entry: Entry) -> Tensor:
    """The tensor of this entry, as a view into ``vector`` (n,)."""
    return vector[entry.start : entry.start + entry.numel].view(entry.shape)


def _mean(state: FactorState, key: str, first: Tensor) -> Tensor:
    """The plain mean of a personal tensor over the clients that took part, by id; ``first`` if no client did."""
    if not state.clients:
        return first
    total = torch.zeros(first.shape, dtype=torch.float64)
    for client in sorted(state.clients):
        total += state.clients[client][key]
    return (total / len(state.clients)).float()
