"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A is shared, B and the head belong to each client for ever.

    A <- sum_k p_k A_k,   p_k ~ n_k        averaged and sent, r in entries a layer both ways
    B_k, head_k                            trained beside A, never sent, never averaged

A client starts a round from the global A and its own B_k and head_k, as its last round left them; before its first
round they are those of the initial adapter, the same for all. The server optimizer moves A alone. The simulator keeps
B_k and head_k of every client seen (`state.clients`); within a round they wait until the cohort is through.

There is no single global model. The method's own metric is the mean over clients of what each client's own model
(`own`) achieves. `delta` and `head`, which evaluation and export of one model ask for, give a stand-in: the global A
with the plain mean of B and of the head over the clients seen so far, and with the initial ones before any was.

No options. The equations are collected facts about the paper, not its text; the stand-in is our choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, Entry, LowRank
from rayfed.methods._factor_mean import FactorMean, FactorState
from rayfed.methods.base import Advance, Profile, Start, Trainable, Update, fedavg, mean_change

PERSONAL = ("B", "head")


@dataclass(frozen=True)
class FedSA(FactorMean):
    """Average A only. The state's vector holds the global A, and the initial B and head, which never change."""

    personal = True

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        return Start(_own(state, client.client), state.layout, known=state.layout.mask(*PERSONAL))

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(personal=PERSONAL)

    def aggregate(self, state: FactorState, updates: Iterable[Update], advance: Advance = fedavg) -> FactorState:
        clients = dict(state.clients)
        change = mean_change(_keeping(updates, clients), state.layout.size)
        shared = state.layout.mask("A")
        vector = state.vector.clone()
        vector[shared] = advance("A", vector[shared], change[shared])
        report = {"clients_seen": float(len(clients))}
        return replace(state, vector=vector, clients=clients, rounds=state.rounds + 1, report=report)

    def own(self, state: FactorState, client: int) -> Adapter:
        """The client's own model: the global A with its B and head, the initial ones if it was never seen."""
        return state.layout.unflatten(_own(state, client))

    def delta(self, state: FactorState, layer: str) -> LowRank:
        shared = super().delta(state, layer)
        return LowRank(_mean(state, f"B.{layer}", shared.B), shared.A, shared.scale)

    def head(self, state: FactorState) -> Mapping[str, Tensor]:
        return {name: _mean(state, f"head.{name}", first) for name, first in super().head(state).items()}


def _own(state: FactorState, client: int) -> Tensor:
    """What the client starts from, (n,), in storage of its own."""
    vector = state.vector.clone()
    for entry in state.layout.entries:
        if entry.part in PERSONAL and client in state.clients:
            own = state.clients[client][_key(entry)]
            vector[entry.start : entry.start + entry.numel] = own.reshape(-1)
    return vector


def _keeping(updates: Iterable[Update], clients: dict[int, Mapping[str, Tensor]]) -> Iterator[Update]:
    """The same updates; what each client keeps goes into ``clients``, copied out of the update's storage."""
    for update in updates:
        if update.personal_values is None:
            raise ValueError(f"the update of client {update.client.client} lacks its personal parts")
        clients[update.client.client] = {
            _key(entry): update.personal_values[entry.start : entry.start + entry.numel].view(entry.shape).clone()
            for entry in update.layout.entries
            if entry.part in PERSONAL
        }
        yield update


def _mean(state: FactorState, key: str, first: Tensor) -> Tensor:
    """The plain mean of a personal tensor over the clients seen, in the order of their ids; ``first`` if none was."""
    if not state.clients:
        return first
    total = torch.zeros(first.shape, dtype=torch.float64)
    for client in sorted(state.clients):
        total += state.clients[client][key]
    return (total / len(state.clients)).float()


def _key(entry: Entry) -> str:
    return f"{entry.part}.{entry.name}"
