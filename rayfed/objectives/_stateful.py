"""The base class of objectives that send something beside the adapter, or that store something between rounds.

Such an objective has two halves. In every round the server calls

1. `send` once: the message that every client of the cohort receives beside its adapter.
2. At each client, with what it received and what it stored: `terms` and `correction`, which change its gradient, or
   `twin`, `estimate` and `combined`, which train a second trajectory; `own_penalty`, `targets` and `samples`, which
   change its loss; after training `message`, which goes up, and `store`: what the client has in its next round.
3. `weights` once, if the objective decides how much each client counts; `changed` for each client, if the objective
   decides what the method aggregates.
4. `advance` for every tensor of the method, if the objective has a server step of its own.
5. `absorb` once: the next state of the server half, from the messages of the cohort.

Messages are encoded, counted in the ledger, and decoded like adapters. What a client stored travels with its job, and
is no traffic. The state of both halves is in the checkpoint and in `state/digest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from rayfed.errors import allowed
from rayfed.lora.adapter import Layout
from rayfed.objectives._class_statistics import ClassStatistics
from rayfed.objectives.base import Objective

if TYPE_CHECKING:
    from rayfed.config.training import Client, Server


@dataclass(frozen=True)
class Message:
    """What travels beside the adapter, in one direction and of one client. Each part that is not None is a payload."""

    vector: Tensor | None = None
    """(n,) float32, one number for every entry of the adapter. Only the entries that the client uploads travel, in the
    number format of the direction. Up, only the largest of them travel if uploads are sparse."""
    numbers: Tensor | None = None
    """(m,) float32, of any length. They travel as they are."""


@dataclass(frozen=True)
class ClientRound:
    """One client in one round, as its objective knows it. n: the entries of its adapter."""

    start: Tensor
    """(n,) float32: the values with which the client begins the round."""
    uploaded: Tensor
    """(n,) bool: the entries that train and may be sent up. The vectors of messages are 0 elsewhere."""
    rates: Tensor
    """(n,) float32: the learning rate of each entry, the same in every step of the round."""
    received: Message = field(default_factory=Message)
    """The server's message, as the client decoded it."""
    stored: Tensor | None = None
    """(m,) float32: what `store` returned in the client's last round. None: it never took part."""
    statistics: ClassStatistics | None = None
    """Of what `Stateful.measures` names. Only `message` and `store` have it, as it is of the trained model."""
    layout: Layout = field(default_factory=lambda: Layout(()))
    """The order and shapes of the client's entries."""
    products: tuple[str, ...] = ()
    """The adapted layers in model order, if the method averages products (`rayfed.methods.Method.averages`)."""


@dataclass(frozen=True)
class Received:
    """The messages of a round's clients, as the server decoded them. Clients that were dropped sent none."""

    clients: int
    """How many clients sent a message, at least 1."""
    vector: Tensor | None
    """(n,) float64: the sum of the vectors; None if the messages have none."""
    numbers: Sequence[Tensor]
    """(m,) float32 of each client, in the order of the cohort; empty if the messages have none."""


@dataclass(frozen=True)
class RunFacts:
    """What a stateful objective must know of the other axes, to refuse what it does not go with."""

    method: str
    fixed_gauge: bool
    averages: Literal["changes", "products"]
    ignores_weights: str
    """These three: see `rayfed.methods.Method`."""
    mixed_ranks: bool
    private: bool
    sparse_down: bool
    """Whether some client's download may be sparse."""
    sparse_up: bool
    client: Client
    server: Server


class Stateful(Objective):
    """An objective with client state, further messages, or a server half. A subclass is a frozen dataclass."""

    entrywise: ClassVar[bool] = True
    """Whether it adds and subtracts entries of adapters that clients computed in different rounds. Then entry i must
    mean the same for all clients and in all rounds: all clients have one rank, and the method has a fixed gauge."""
    measures: ClassVar[Literal["features", "outputs"] | None] = None
    """What a pass over the client's rows by its trained model measures by class, for `message`: the inputs of the head,
    which must be one linear layer then, or the model's outputs. None: there is no such pass. The rows have one class
    each. There is no dropout in it, and no row is changed at random."""
    server_weights: ClassVar[str | None] = None
    """The only aggregation weights that go with it; None: any."""
    server_optimizers: ClassVar[tuple[str, ...] | None] = None
    """The server optimizers that go with it, the default first; None: any."""
    plain_sgd: ClassVar[str] = ""
    """Why clients must take plain SGD steps, without momentum and clipping, in a few words. Empty: they need not."""
    dense_down: ClassVar[str] = ""
    """Why downloads must be dense, in a few words. Empty: they may be sparse."""
    dense_up: ClassVar[str] = ""
    """The same for uploads."""

    def check_run(self, name: str, facts: RunFacts) -> None:
        """UserError where the method or another setting does not fit the objective ``name``."""
        if self.entrywise and not facts.fixed_gauge:
            what = (
                f"entry i of the adapter does not mean the same in every round and for every client of {facts.method}"
            )
            raise allowed(
                "objective.name", name, f"{what}; a method of fixed gauge, such as fedit or flasc, is allowed"
            )
        if self.entrywise and facts.mixed_ranks:
            raise allowed("objective.name", name, "all clients must have one rank: profiles.kind=same is allowed")
        if facts.private:
            what = "what it sends beside the adapter gets no noise: privacy.kind=none is allowed"
            raise allowed("objective.name", name, what)
        if self.dense_down and facts.sparse_down:
            raise allowed("objective.name", name, f"{self.dense_down}: wire.down.density=1 is allowed")
        if self.dense_up and facts.sparse_up:
            raise allowed("objective.name", name, f"{self.dense_up}: wire.up.density=1 is allowed")
        if self.plain_sgd:
            _check_sgd(name, facts.client, self.plain_sgd)
        weights, optimizer = facts.server.weights, facts.server.optimizer
        if self.server_weights is not None and weights not in ("auto", self.server_weights):
            raise allowed("server.weights", weights, f"{name} allows auto and {self.server_weights}")
        if self.server_optimizers is not None and optimizer not in ("auto", *self.server_optimizers):
            raise allowed("server.optimizer", optimizer, f"{name} allows auto and {', '.join(self.server_optimizers)}")

    def server_optimizer(self, default: str) -> str:
        """What `server.optimizer: auto` is, where the method's default is ``default``."""
        own = self.server_optimizers
        return default if own is None or default in own else own[0]

    # The client half.

    def terms(self, client: ClientRound) -> Mapping[str, Tensor]:
        """What `correction` needs of a client, by name: vectors (n,) by entry, and scalars (). Called before training.

        All clients of a round have the same names.
        """
        return {}

    def correction(self, values: Tensor, start: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """What is added to the gradient (K, n) before masks and clipping, where `terms` gave something.

        ``values`` and ``start`` (K, n) as in `gradient`: one part of the adapters of a pack's K clients. ``terms`` has
        the clients' vectors as (K, n) and their scalars as (K, 1).
        """
        raise NotImplementedError

    def own_penalty(self, client: ClientRound) -> Objective | None:
        """An objective whose `penalty` is added to this client's loss alone, or None. Called before training."""
        return None

    def twin(self, client: ClientRound) -> Tensor | None:
        """The start (n,) of a second trajectory, or None for no such trajectory.

        It has the batches and the dropout of the first one, and only those entries train that train there.
        """
        return None

    @property
    def estimates(self) -> bool:
        """Whether `estimate` takes the place of the gradient. Then each trajectory takes twice the work."""
        return type(self).estimate is not Stateful.estimate

    def estimate(self, gradient: Tensor, before: Tensor, last: Tensor) -> Tensor:
        """The estimate of the gradient with which a trajectory takes its step, after masks and before clipping.

        ``gradient`` (K, n) is that of the batch at the present point, ``before`` that of the same batch at the point
        before the last step, ``last`` the estimate of the last step. In the first step the gradient is the estimate.
        """
        raise NotImplementedError

    def targets(self, client: ClientRound) -> Tensor | None:
        """What `rows` has of the client as `RowContext.targets`: of each class one row, (C, m). Called before training.

        All clients of a round have some of equal shape, or none has.
        """
        return None

    @property
    def draws_samples(self) -> bool:
        """Whether the head trains on `samples`."""
        return type(self).samples is not Stateful.samples

    def samples(self, client: ClientRound, rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """Inputs of the head (m, d) and their classes (m,), on which the client's head trains in one step, or None.

        ``rows`` are those of its batch, ``draw`` a generator of this client and step. The mean cross-entropy of the
        samples, times `sample_weight`, is added to the client's loss. Nothing but the head has a gradient of it. All
        clients of a round have samples, or none has.
        """
        return None

    @property
    def sample_weight(self) -> float:
        """The weight of the samples' mean loss, where that of the batch's mean loss is 1."""
        return 1.0

    def combined(self, client: ClientRound, trained: Tensor, twin: Tensor) -> Tensor:
        """The client's trained entries (n,), from those of its two trajectories. The upload is its change.

        If either has values that are not finite, so must the result: then the client diverged.
        """
        raise NotImplementedError

    def message(self, client: ClientRound, trained: Tensor, steps: int, twin: Tensor | None = None) -> Message:
        """What the client sends up beside its change. ``trained`` (n,) are its values after ``steps`` steps.

        ``twin`` (n,) is the end of its second trajectory.
        """
        return Message()

    def store(self, client: ClientRound, sent: Message) -> Tensor | None:
        """What the client has in its next round, (m,) float32, given its message as the server decodes it."""
        return None

    # The server half.

    def send(self, state: Mapping[str, Tensor]) -> Message:
        """What every client of the round receives beside its adapter. ``state`` is empty before the first round."""
        return Message()

    @property
    def decides_weights(self) -> bool:
        """Whether `weights` takes the place of `server.weights`."""
        return type(self).weights is not Stateful.weights

    def weights(self, numbers: Sequence[Tensor]) -> Sequence[float]:
        """The aggregation weights of the clients that were not dropped, from the numbers (m,) of their messages."""
        raise NotImplementedError

    @property
    def changes_uploads(self) -> bool:
        """Whether `changed` takes the place of a client's upload. Then the server decodes each of them."""
        return type(self).changed is not Stateful.changed

    def changed(self, change: Tensor, message: Message) -> Tensor:
        """The change of a client (n,) that the method aggregates, from the uploaded change (n,) and the message."""
        raise NotImplementedError

    @property
    def advances(self) -> bool:
        """Whether `advance` takes the place of the server optimizer."""
        return type(self).advance is not Stateful.advance

    def advance(self, state: dict[str, Tensor], name: str, value: Tensor, change: Tensor) -> Tensor:
        """The next value of the method's tensor ``name``, from its mean change. May set tensors of ``state``."""
        raise NotImplementedError

    def absorb(
        self, state: Mapping[str, Tensor], received: Received, start: Tensor, population: int
    ) -> dict[str, Tensor]:
        """The state after a round in which at least one client was not dropped. Must not change tensors in place.

        ``start`` (n,) is the adapter that the round began with, before it was encoded. ``population`` counts the
        clients of which cohorts are drawn.
        """
        return dict(state)


def _check_sgd(name: str, client: Client, why: str) -> None:
    if client.optimizer != "sgd":
        raise allowed("client.optimizer", client.optimizer, f"{name} {why}: sgd is allowed")
    if client.momentum:
        raise allowed("client.momentum", client.momentum, f"{name} {why}: 0 is allowed")
    if client.clip_norm is not None:
        raise allowed("client.clip_norm", client.clip_norm, f"{name} {why}: null is allowed")
