"""The server half of a stateful objective in a run: its state, what its clients stored, and the messages of a round.

For an objective without a server half all of this is empty, and nothing that a round computes or sends changes. The
state is replaced when a round has ended, never changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.messages import EncodedMessage, ObjectiveOrder, TrainResult
from rayfed.clients.objective_messages import decode_encoded, encode_message
from rayfed.clients.plan import RunPlan
from rayfed.clients.transfer import Uploadable
from rayfed.methods import Advance, Sparse
from rayfed.objectives import Received, Stateful
from rayfed.profiles.profile import Profile
from rayfed.server.client_state import ClientStore, StoredTensors
from rayfed.server.downlink import Downlink
from rayfed.server.executor import Executor, Handle, SubmissionResult
from rayfed.server.optimizers import ServerOptimizer

STORED = "stored"
"""The name of a client's vector in its file."""


@dataclass
class _Round:
    """What adds up during a round."""

    state: dict[str, Tensor]
    down: list[_Down] = field(default_factory=list)
    places: dict[int, Uploadable] = field(default_factory=dict)  # by client
    weights: dict[int, float] = field(default_factory=dict)  # by client
    total: Tensor | None = None
    numbers: list[Tensor] = field(default_factory=list)
    clients: int = 0
    stored: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Down:
    """The message to clients that may upload the same entries."""

    places: Uploadable
    message: EncodedMessage
    vector: Handle | None
    numbers: Handle | None


class ServerObjective:
    """The objective of a plan at the server. ``out``: the run directory, where client state is stored."""

    def __init__(self, plan: RunPlan, out: Path, executor: Executor) -> None:
        self.plan, self.executor = plan, executor
        self.objective = plan.objective if isinstance(plan.objective, Stateful) else None
        self.store = ClientStore(out / "clients", "objective")
        self.state: dict[str, Tensor] = {}
        self.clients: dict[int, StoredTensors] = {}
        self.begin()

    @property
    def decides_weights(self) -> bool:
        """Whether it needs the messages of all clients before the first update is aggregated."""
        return self.objective is not None and self.objective.decides_weights

    def restore(self, state: Mapping[str, Tensor], clients: dict[int, StoredTensors]) -> None:
        """Goes on from the state of a checkpoint."""
        self.state, self.clients = dict(state), clients

    def begin(self) -> None:
        """Begins a round."""
        self._round = _Round(dict(self.state))

    def order(self, client: int, places: Uploadable, index: Callable[[Handle], int]) -> ObjectiveOrder | None:
        """What the client's job says of the objective. ``index`` gives the position of a payload in the job."""
        if self.objective is None:
            return None
        down, stored = self._down(self.objective, places), None
        self._round.places[client] = down.places
        if client in self.clients:
            stored = self.executor.put(wire.encode(self.clients[client][STORED]))
        handles = (down.vector, down.numbers, stored)
        return ObjectiveOrder(*(None if handle is None else index(handle) for handle in handles))

    def _down(self, objective: Stateful, places: Uploadable) -> _Down:
        for made in self._round.down:
            if made.places.same(places):
                return made
        message = encode_message(objective.send(self.state), places, self.plan.wire.down.values)
        vector, numbers = (p and self.executor.put(p) for p in (message.vector, message.numbers))
        self._round.down.append(_Down(places, message, vector, numbers))
        return self._round.down[-1]

    def payloads(self, client: int, result: TrainResult, i: int) -> tuple[Sequence[bytes], Sequence[bytes]]:
        """The payloads that the pack's client i received and sent beside its adapter."""
        if self.objective is None:
            return (), ()
        sent = result.messages[i]
        return self._down(self.objective, self._round.places[client]).message.payloads, sent.payloads if sent else ()

    def weighed(
        self, packs: Sequence[Sequence[Profile]], results: Iterator[SubmissionResult]
    ) -> Iterator[SubmissionResult]:
        """The same results, in the order of the packs, after the weights of the round were taken from all of them."""
        assert self.objective is not None
        everything, sent = list(results), dict[int, Tensor]()
        for done in everything:
            messages = cast(TrainResult, done.result).messages
            for client, message in zip(packs[done.index], messages, strict=True):
                if message is not None and message.numbers is not None:
                    sent[client.client] = wire.decode(message.numbers).values
        self._round.weights = dict(zip(sent, self.objective.weights(list(sent.values())), strict=True))
        yield from everything

    def weight(self, client: int, otherwise: float) -> float:
        """The client's weight, where the objective decides it."""
        return self._round.weights.get(client, otherwise)

    @property
    def needs_clients(self) -> bool:
        """Whether it needs each client's update, so that packs may not be summed by the workers."""
        return self.objective is not None and (self.objective.decides_weights or self.objective.changes_uploads)

    def change(self, client: int, upload: Tensor | Sparse, result: TrainResult, i: int) -> Tensor | Sparse:
        """What the method aggregates in place of the upload of the pack's client i."""
        if self.objective is None or not self.objective.changes_uploads:
            return upload
        message = result.messages[i]
        assert message is not None
        dense = upload.dense() if isinstance(upload, Sparse) else upload
        return self.objective.changed(dense, decode_encoded(message, self._round.places[client]))

    def collect(self, client: int, result: TrainResult, i: int) -> None:
        """Adds up the message of the pack's client i, in the order of the cohort, and what the client stored."""
        if self.objective is None or (message := result.messages[i]) is None:
            return
        own, stored = self._round, result.stored[i]
        received = decode_encoded(message, own.places[client])
        own.clients += 1
        if received.vector is not None:
            own.total = torch.zeros(len(received.vector), dtype=torch.float64) if own.total is None else own.total
            own.total += received.vector
        if received.numbers is not None:
            own.numbers.append(received.numbers)
        if stored is not None:
            own.stored[client] = {STORED: wire.decode(stored).values}

    def advance(self, optimizer: ServerOptimizer) -> Advance:
        """The server step of the round: that of the objective, or of the server optimizer."""
        if self.objective is None or not self.objective.advances:
            return optimizer.advance
        return partial(self.objective.advance, self._round.state)

    def finish(self, downlink: Downlink) -> None:
        """Ends a round in which not all clients were dropped. ``downlink``: its downloads."""
        if self.objective is None:
            return
        assert downlink.first is not None
        own, start, federation = self._round, downlink.first.start.vector, self.plan.federation
        received = Received(own.clients, own.total, own.numbers)
        population = federation.clients if self.plan.server.empty_clients else len(federation.holders)
        self.state = self.objective.absorb(own.state, received, start, population)

    def save(self, round: int) -> None:
        """Writes what the clients of the round stored."""
        if self._round.stored:
            self.clients = self.store.save({**self.clients, **self._round.stored}, round)
