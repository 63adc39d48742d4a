"""One round as plain functions: what is sent, what is asked for, what comes back, and every byte of it written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

from rayfed import wire
from rayfed.clients.messages import ClientOrder, TrainJob, TrainResult
from rayfed.config import Experiment
from rayfed.errors import RunError
from rayfed.methods import Method, PackSum, Profile, Update
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.downlink import Downlink, Download
from rayfed.server.evaluation.diagnostics import Diagnostics
from rayfed.server.executor import Handle, Submission, SubmissionResult, in_order


@dataclass
class RoundStats:
    """What a round adds up to while its uploads stream in."""

    loss: float = 0.0  # sum over clients of mean loss times examples
    examples: int = 0
    ok: int = 0
    retried: int = 0
    split: int = 0  # clients whose pack did not fit into memory
    dense: int = 0  # bytes of the same messages, had every entry travelled in fp32
    ranks: dict[int, int] = field(default_factory=dict)  # trained rank -> clients
    waited: float = 0.0  # seconds in which the server had nothing to do but wait for uploads


@dataclass
class RoundLog:
    """Where a round writes down what travelled and what happened."""

    ledger: wire.Ledger
    base_updates: BaseUpdates
    stats: RoundStats
    diagnostics: Diagnostics | None = None


@dataclass(frozen=True)
class RoundRequest:
    """What all jobs of a round have in common."""

    t: int
    lr: float
    weights: str  # "uniform" or "examples"
    values: str  # number format of uploads
    sums: bool  # may packs be summed where they were trained?


@dataclass(frozen=True)
class ClientResult:
    """One client's part of a result: its place in the pack, and what it was asked."""

    client: Profile
    order: ClientOrder
    result: TrainResult
    i: int


def updates(
    method: Method, state: Any, t: int, lr: float, packs: Sequence[Sequence[Profile]], weights: str,
    experiment: Experiment, run: Callable[[Sequence[Submission]], Iterator[SubmissionResult]], downlink: Downlink, log: RoundLog,
) -> Iterator[Update | PackSum]:  # fmt: skip
    """Trains the cohort and yields its updates in the order of the packs, whatever the order of arrival.

    A linear method gets each pack as one sum, of which the bits do not depend on who added it up. Only one decoded
    upload is in memory at a time, and of it only the entries that were sent.
    """
    ask = RoundRequest(t, lr, weights, experiment.wire.up.values, method.sum_in_worker and log.diagnostics is None)
    tasks = [_task(pack, method, state, ask, downlink) for pack in packs]
    for done in _waiting(in_order(run(tasks)), log.stats):
        job, result = cast(TrainJob, tasks[done.index].job), cast(TrainResult, done.result)
        pack = [
            ClientResult(*client, result, i) for i, client in enumerate(zip(packs[done.index], job.orders, strict=True))
        ]
        log.stats.retried += done.retries * len(pack)
        log.stats.split += len(pack) if len(result.parts) > 1 else 0
        if job.summed:
            for arrival in pack:
                _book(arrival, t, downlink, log)
            yield from result.summed
        elif method.sum_in_worker and len(pack) > 1:
            came = (_update(arrival, t, downlink, log) for arrival in pack)
            changes = ((update.weight, update.sparse_change) for update in came)
            yield from (PackSum.of(islice(changes, part), job.orders[0].layout.size) for part in result.parts)
        else:
            yield from (_update(arrival, t, downlink, log) for arrival in pack)


def _update(arrival: ClientResult, t: int, downlink: Downlink, log: RoundLog) -> Update:
    """What one client sent, written down and decoded."""
    sent = _book(arrival, t, downlink, log)
    order, result, i = arrival.order, arrival.result, arrival.i
    kept = result.personal[i]
    update = Update(
        arrival.client,
        order.weight,
        sent.vector,
        sent.uploadable(order.trainable).placed(wire.decode(result.uploads[i])),
        order.layout,
        {"loss": result.losses[i], "examples": result.examples[i], "steps": result.steps[i]},
        None if kept is None else wire.decode(kept).dense(),
    )
    if log.diagnostics is not None:
        log.diagnostics.see(update, sent.start.base)
    return update


def _book(arrival: ClientResult, t: int, downlink: Downlink, log: RoundLog) -> Download:
    """Writes down what one client received, sent and did; returns what it had received."""
    ledger, stats = log.ledger, log.stats
    client, result, i = arrival.client, arrival.result, arrival.i
    sent = downlink.of(client)
    downlink.forget(client)
    missed = log.base_updates.collect(client.client)
    for sizes in missed:
        ledger.add_sizes(round=t + 1, client=client.client, direction="down", sizes=sizes)
    for payload in sent.payloads:
        ledger.add(round=t + 1, client=client.client, direction="down", payload=payload)
    if result.uploads:
        ledger.add(round=t + 1, client=client.client, direction="up", payload=result.uploads[i])
    else:
        ledger.add_sizes(round=t + 1, client=client.client, direction="up", sizes=result.sizes[i])
    stats.dense += sum(wire.HEADER_BYTES + 4 * sizes.n for sizes in (*missed, *sent.sizes, result.sizes[i]))
    stats.loss += result.losses[i] * result.examples[i]
    stats.examples += result.examples[i]
    stats.ok += 1
    stats.ranks[result.ranks[i]] = stats.ranks.get(result.ranks[i], 0) + 1
    _check_rank(client, arrival.order, result.ranks[i])
    return sent


def _waiting(stream: Iterator[SubmissionResult], stats: RoundStats) -> Iterator[SubmissionResult]:
    """The same, with the time that each took to come added up."""
    while True:
        begun = time.perf_counter()
        done = next(stream, None)
        stats.waited += time.perf_counter() - begun
        if done is None:
            return
        yield done


def _task(pack: Sequence[Profile], method: Method, state: Any, ask: RoundRequest, downlink: Downlink) -> Submission:
    handles: list[Handle] = []

    def place(handle: Handle | None) -> int | None:
        """The handle's position among the job's payloads; clients that share a payload share its place."""
        if handle is None:
            return None
        for i, known in enumerate(handles):
            if known is handle:
                return i
        handles.append(handle)
        return len(handles) - 1

    orders = []
    for client in pack:
        sent, trainable = downlink.of(client), method.trainable(state, client)
        layout = sent.start.layout
        density = 1.0 if sent.start.dense else client.density_up
        orders.append(
            ClientOrder(
                client=client.client,
                layout=layout,
                payload=cast(int, place(sent.handle)),
                trainable=trainable,
                budget=sent.budget(trainable, density),
                density_up=density,
                values=ask.values,
                weight=float(client.examples) if ask.weights == "examples" else 1.0,
                known=place(sent.known),
                base=place(sent.base),
                base_layout=sent.base_layout,
            )
        )
    # To fetch one dense sum costs about as much as to decode one sparse upload (`rayfed bench aggregate`).
    summed = ask.sums and len(pack) > 1
    return Submission(TrainJob(ask.t, ask.lr, tuple(orders), summed), tuple(handles))


def _check_rank(client: Profile, order: ClientOrder, trained: int) -> None:
    """The rank that really trained must be the rank that was sent: a mix that is not applied is worth nothing."""
    sent = max((entry.shape[0] for entry in order.layout.entries if entry.part == "A"), default=0)
    partly = order.trainable.entries is not None or order.trainable.received_only
    if trained > sent or (trained < sent and not partly):
        raise RunError(f"client {client.client}: was sent rank {sent} and trained rank {trained}")
