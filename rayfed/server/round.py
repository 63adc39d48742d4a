"""One round as plain functions: what is sent, what is asked for, what comes back, and every byte of it written down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.jobs import Order, TrainJob, TrainResult
from rayfed.config import Experiment
from rayfed.errors import RunError
from rayfed.methods import Method, Profile, Start, Update
from rayfed.methods.base import received
from rayfed.server.crew import Crew, Handle, Task, in_order


@dataclass(frozen=True)
class Download:
    """What one tier receives this round: the payload, what it decodes to (n,), which entries arrived (None: all)."""

    start: Start
    payload: bytes
    handle: Handle
    vector: Tensor
    mask: Tensor | None


def download(method: Method, state: Any, client: Profile, values: str, crew: Crew) -> Download:
    """Broadcast, sparsify, encode. The decoded vector is what clients train from and what `aggregate` calls sent."""
    start = method.broadcast(state, client)
    if not bool(torch.isfinite(start.vector).all()):
        raise RunError("the global adapter has values that are not finite; lower server.lr or client.lr")
    mask = start.mask
    if mask is None and not start.dense and client.density_down < 1:
        mask = wire.top_mask(start.vector, client.density_down)
    indices = None if mask is None else mask.nonzero().squeeze(1)
    payload = wire.encode(start.vector, indices=indices, values=values)
    decoded = wire.decode(payload)
    return Download(start, payload, crew.put(payload), decoded.dense(), received(decoded))


def plan_packs(clients: Sequence[Profile], size: int) -> list[list[Profile]]:
    """Clients trained together: neighbours in the cohort. A function of the settings, never of idle workers."""
    return [list(clients[i : i + size]) for i in range(0, len(clients), size)]


@dataclass
class Tally:
    """What a round adds up to while its uploads stream in."""

    loss: float = 0.0  # sum over clients of mean loss times examples
    examples: int = 0
    ok: int = 0
    retried: int = 0


def updates(
    method: Method, state: Any, t: int, lr: float, clients: Sequence[Profile], weights: str, experiment: Experiment,
    crew: Crew, ledger: wire.Ledger, downloads: dict[tuple[int, float], Download], tally: Tally,
) -> Iterator[Update]:  # fmt: skip
    """Trains the cohort and yields its updates in cohort order, whatever the order of arrival.

    ``downloads`` is filled with what each tier was sent. Only one decoded upload is in memory at a time.
    """
    for client in clients:
        if client.tier not in downloads:
            downloads[client.tier] = download(method, state, client, experiment.wire.down.values, crew)
    packs = plan_packs(clients, experiment.engine.pack)
    tasks = [_task(pack, method, state, t, lr, experiment, downloads) for pack in packs]
    for done in in_order(crew.run(tasks)):
        job, result = cast(TrainJob, tasks[done.index].job), cast(TrainResult, done.result)
        tally.retried += done.retries * len(job.orders)
        for i, (client, order) in enumerate(zip(packs[done.index], job.orders, strict=True)):
            sent = downloads[client.tier]
            ledger.add(round=t + 1, client=client.client, direction="down", payload=sent.payload)
            ledger.add(round=t + 1, client=client.client, direction="up", payload=result.uploads[i])
            tally.loss += result.losses[i] * result.examples[i]
            tally.examples += result.examples[i]
            tally.ok += 1
            layout = sent.start.layout
            support = order.trainable.support(layout, sent.mask)
            change = sent.vector.new_zeros(layout.size)
            change[support] = wire.decode(result.uploads[i]).dense()
            weight = float(client.examples) if weights == "examples" else 1.0
            stats = {"loss": result.losses[i], "examples": result.examples[i], "steps": result.steps[i]}
            yield Update(client, weight, sent.vector, change, layout, stats)


def _task(
    pack: list[Profile], method: Method, state: Any, t: int, lr: float, experiment: Experiment,
    downloads: dict[tuple[int, float], Download],
) -> Task:  # fmt: skip
    tiers = list(dict.fromkeys(client.tier for client in pack))
    orders = tuple(
        Order(
            client=client.client,
            payload=tiers.index(client.tier),
            trainable=method.trainable(state, client),
            density_up=1.0 if downloads[client.tier].start.dense else client.density_up,
            values=experiment.wire.up.values,
        )
        for client in pack
    )
    layouts = tuple(downloads[tier].start.layout for tier in tiers)
    return Task(TrainJob(t, lr, layouts, orders), tuple(downloads[tier].handle for tier in tiers))
