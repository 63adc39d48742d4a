"""One round of a topology without a server: clients train, and exchange messages with their neighbours alone.

`gossip_round` is the round as one function of the state, as `rayfed.server.star.train_round` is for the star. What is
computed is said by the algorithm (`rayfed.topologies`); here are its two means: jobs on workers, and messages on edges.
The process that runs the rounds computes each client's averages in its place. It uses nothing for them but what the
client has: its own vectors, and what the bytes from its neighbours decode to.

A message to three neighbours is three rows `up` of the sender in the ledger and one row `down` of each receiver, all
with the same checksum. So `bytes/up` is what all clients sent, and `bytes/down` what all of them received.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.messages import ClientOrder, TrainJob, TrainResult
from rayfed.clients.plan import RunPlan
from rayfed.errors import RunError
from rayfed.methods import Trainable
from rayfed.profiles.profile import Profile
from rayfed.server.downlink import Downlink
from rayfed.server.executor import Executor, Submission, in_order
from rayfed.server.objective import ServerObjective
from rayfed.server.optimizers import ServerOptimizer, scheduled
from rayfed.server.star import RoundLog, timed
from rayfed.topologies import OwnModels, columns_of, metropolis


def gossip_round(
    plan: RunPlan, state: Any, t: int, packs: Sequence[Sequence[Profile]], optimizer: ServerOptimizer,
    downlink: Downlink, executor: Executor, log: RoundLog, objective: ServerObjective,
) -> Any:  # fmt: skip
    """Trains round ``t`` (from 0) on the graph of the plan and returns the next state, with all clients' vectors.

    The clients of the ``packs`` are active: they train, and average with their active neighbours. All others stay as
    they are. The ``optimizer``, ``downlink`` and ``objective`` of a star are not used. RunError where a pack cannot be
    trained, or where a client's training or model is not finite.
    """
    assert plan.topology is not None
    assert isinstance(plan.method, OwnModels)
    network = _Network(plan, plan.method, state, t, packs, executor, log)
    if not network.clients:
        return state
    vectors = plan.method.vectors
    own = {name: torch.stack([state.clients[c][name] for c in network.clients]) for name in vectors}
    after = plan.topology.algorithm.round(own, network)
    network.check(after["x"])
    network.report()
    if not network.sends.any():
        return state
    clients = dict(state.clients)
    for i, client in enumerate(network.clients):
        if network.sends[i]:
            clients[client] = {name: after[name][i] for name in vectors}
    state, log.figures["topology/consensus"] = plan.method.mean_state(state, clients)
    log.aggregated = log.reports = True
    return state


class _Network:
    """The active clients of a round (`rayfed.topologies.Network`), in the order of their ids."""

    def __init__(
        self, plan: RunPlan, method: OwnModels, state: Any, t: int, packs: Sequence[Sequence[Profile]],
        executor: Executor, log: RoundLog,
    ) -> None:  # fmt: skip
        assert plan.topology is not None
        self.plan, self.t, self.packs, self.executor, self.log = plan, t, packs, executor, log
        self.graph, self.settings = plan.topology.graph, plan.client
        self.lr = scheduled(plan.client.lr, plan.client.schedule, t, plan.server.rounds)
        self.clients = sorted(client.client for client in chain.from_iterable(packs))
        self.row = {client: i for i, client in enumerate(self.clients)}
        self.start, self.trains = method.common(state)
        self.trainable: Trainable = method.trainable(state, method.profile)
        self.columns = columns_of(self.start.layout)[self.trains]
        self.travels = None if self.start.known is None else ~self.start.known
        self.known = None
        if self.start.known is not None:
            payload = wire.encode(self.start.vector, indices=self.start.known.nonzero().squeeze(1))
            self.known = executor.put(payload)
        self.sends = torch.ones(len(self.clients), dtype=torch.bool)  # who is not dropped
        self.ranks: dict[int, int] = {}  # by client that trained
        self.split: set[int] = set()  # clients whose pack did not fit into memory

    def exchange(self, values: Tensor) -> Tensor:
        """``W values`` (K, m), with the weights between those clients that send. In the number format of the messages:

            v_i <- v_i + sum_j W_ij (Q(v_j) - Q(v_i)),   Q(v): what the bytes of v decode to

        W is symmetric, so the mean of all rows stays, whatever Q is. Counts every message at both ends of its edge.
        """
        self.check(values)
        senders = [client for client in self.clients if self.sends[self.row[client]]]
        sizes: dict[int, wire.Sizes] = {}
        arrived: dict[int, Tensor] = {}
        for client in senders:
            payload = wire.encode(values[self.row[client]], values=self.plan.wire.up.values)
            sizes[client], arrived[client] = wire.inspect(payload), wire.decode(payload).dense()
        mixed = values.clone()
        for client, weights in metropolis(self.graph.among(senders)).items():
            total = values[self.row[client]].double()
            for other, weight in weights.items():
                total.add_(arrived[other], alpha=weight)
                self._count(client, other, sizes[client])
            total.sub_(arrived[client], alpha=sum(weights.values()))
            mixed[self.row[client]] = total
        return mixed

    def gradients(self, x: Tensor, step: int) -> Tensor:
        """See `Network.gradients`."""
        return self._run(x, step)

    def train(self, x: Tensor) -> Tensor:
        """See `Network.train`. A client that is dropped keeps its row and sends nothing in this round."""
        return x + self._run(x, None)

    def check(self, values: Tensor) -> None:
        """RunError for the first client whose row of ``values`` is not finite."""
        for client, own in zip(self.clients, values, strict=True):
            if not bool(torch.isfinite(own).all()):
                what = "it has values that are not finite; lower client.lr"
                raise RunError(f"round {self.t + 1}, client {client}: {what}")

    def report(self) -> None:
        """Adds to the log which clients trained, and at which ranks."""
        self.log.trained = [[client, rank] for client, rank in self.ranks.items()]
        self.log.ok, self.log.split = len(self.ranks), len(self.split)

    def _run(self, x: Tensor, step: int | None) -> Tensor:
        """What the clients send of a job (K, m): their gradients in local step ``step``, or their changes (None)."""
        found = torch.zeros_like(x)
        submissions = [self._submission(pack, x, step) for pack in self.packs]
        for done in timed(in_order(self.executor.run(submissions)), self.log):
            result, pack = cast(TrainResult, done.result), self.packs[done.index]
            self.log.retried += done.retries * len(pack)
            self.split |= {client.client for client in pack} if len(result.parts) > 1 else set()
            for i, client in enumerate(pack):
                upload, row = result.uploads[i], self.row[client.client]
                if i in result.diverged:
                    self.log.diverged[client.client] = result.diverged[i]
                if upload is None:
                    self.sends[row] = False
                    continue
                found[row] = wire.decode(upload).dense()
                self.ranks[client.client] = result.ranks[i]
                self.log.loss += result.losses[i] * result.examples[i]
                self.log.examples += result.examples[i]
            if self.log.diverged and self.settings.on_divergence == "fail":
                first, divergence = next(iter(self.log.diverged.items()))
                what = "lower client.lr or set client.clip_norm"
                raise RunError(f"round {self.t + 1}, client {first}: {divergence.reason}; {what}")
        return found

    def _submission(self, pack: Sequence[Profile], x: Tensor, step: int | None) -> Submission:
        """The job of a pack. Its payloads are no messages: they say what each client has."""
        handles = [self.executor.put(payload) for payload in self._models(pack, x)]
        orders = [
            ClientOrder(
                client=client.client,
                layout=self.start.layout,
                payload=place,
                trainable=self.trainable,
                budget=x.shape[1],
                density_up=1.0,
                values="fp32",
                known=None if self.known is None else len(pack),
            )
            for place, client in enumerate(pack)
        ]
        known = () if self.known is None else (self.known,)
        return Submission(TrainJob(self.t, self.lr, tuple(orders), step=step), (*handles, *known))

    def _models(self, pack: Sequence[Profile], x: Tensor) -> Iterator[bytes]:
        """The entries of each client's model that the method does not draw from a seed."""
        for client in pack:
            vector = self.start.vector.masked_scatter(self.trains, x[self.row[client.client]])
            yield wire.encode(vector if self.travels is None else vector[self.travels])

    def _count(self, sender: int, receiver: int, sizes: wire.Sizes) -> None:
        """Records one message on one edge."""
        self.log.ledger.add_sizes(round=self.log.round, client=sender, direction="up", sizes=sizes)
        self.log.ledger.add_sizes(round=self.log.round, client=receiver, direction="down", sizes=sizes)
        self.log.dense += 2 * (wire.HEADER_BYTES + 4 * sizes.n)
