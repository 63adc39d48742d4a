"""One round of the star topology: the server sends to every client of the cohort and receives from each of them.

`train_round` is the round as one function of the state. That of a graph without a server is another such function, see
`rayfed.server.gossip`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from rayfed import wire
from rayfed.channels import OverTheAir
from rayfed.clients.messages import ClientOrder, Divergence, TrainJob, TrainResult
from rayfed.clients.plan import RunPlan
from rayfed.errors import RunError
from rayfed.lora.adapter import Layout
from rayfed.methods import PackSum, Update
from rayfed.privacy import Privacy, Release
from rayfed.profiles.profile import Profile
from rayfed.server.air import Transmission
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.class_head import for_classes
from rayfed.server.cohort_weights import Arrived, weighed
from rayfed.server.downlink import Downlink, Download
from rayfed.server.evaluation.diagnostics import Diagnostics
from rayfed.server.executor import Executor, Handle, Submission, SubmissionResult, in_order
from rayfed.server.objective import ServerObjective
from rayfed.server.optimizers import ServerOptimizer, scheduled

NAMED = 5  # clients that an event names


@dataclass
class RoundLog:
    """Records what travelled in a round (from 1) and what happened. The figures add up while uploads arrive."""

    round: int
    ledger: wire.Ledger
    base_updates: BaseUpdates
    diagnostics: Diagnostics | None = None
    loss: float = 0.0  # sum over the clients that are not dropped of mean loss times examples
    examples: int = 0
    ok: int = 0  # clients that sent an upload
    diverged: dict[int, Divergence] = field(default_factory=dict)  # by client, in the order of the packs
    retried: int = 0
    split: int = 0  # clients whose pack did not fit into memory
    dense: int = 0  # bytes of the same messages, had every entry travelled in fp32
    trained: list[list[int]] = field(default_factory=list)  # [client, trained rank]
    waited: float = 0.0  # seconds in which the server waited for uploads
    aggregated: bool = False  # whether the method made a new state
    reports: bool = False  # whether what it reports about that is about the clients' updates
    privacy: dict[str, float | None] = field(default_factory=dict)  # the metrics `privacy/...`
    analog: bool = False  # whether the uploads are no bytes, see `rayfed.server.air`
    truncated: int = 0  # clients whose channel was too weak to send
    figures: dict[str, float | None] = field(default_factory=dict)  # metrics of weighting, channel and topology
    notes: list[str] = field(default_factory=list)  # further lines for the log of the run

    def record(
        self, client: Profile, result: TrainResult, i: int, received: Download, objective: ServerObjective
    ) -> None:
        """Records client i of a pack's result: every message it received or sent, and its statistics.

        A client that was dropped sent nothing, and its statistics do not count.
        """
        down, up = objective.payloads(client.client, result, i)
        ledger, where = self.ledger, {"round": self.round, "client": client.client}
        missed = self.base_updates.collect(client.client)
        for older in missed:
            ledger.add_sizes(**where, direction="down", sizes=older)
        for payload in (*received.payloads, *down):
            ledger.add(**where, direction="down", payload=payload)
        beside = map(wire.inspect, (*down, *up))
        self.dense += sum(wire.HEADER_BYTES + 4 * sizes.n for sizes in (*missed, *received.sizes, *beside))
        if i in result.diverged:
            self.diverged[client.client] = result.diverged[i]
        upload, sizes = result.uploads[i] if result.uploads else None, result.sizes[i]
        if sizes is None:
            return
        if upload is None:
            ledger.add_sizes(**where, direction="up", sizes=sizes)
        elif not self.analog:
            ledger.add(**where, direction="up", payload=upload)
        for payload in up:
            ledger.add(**where, direction="up", payload=payload)
        if (statistics := result.statistics[i] if result.statistics else None) is not None:
            ledger.add(**where, direction="up", payload=statistics)
            self.dense += len(statistics)
        self.dense += wire.HEADER_BYTES + 4 * sizes.n
        self.loss += result.losses[i] * result.examples[i]
        self.examples += result.examples[i]
        self.ok += 1
        self.trained.append([client.client, result.ranks[i]])

    @property
    def mean_loss(self) -> float | None:
        """The mean training loss over the examples of the clients that were not dropped; None if all were."""
        return self.loss / self.examples if self.examples else None

    @property
    def dropped(self) -> int:
        """The number of clients that were dropped."""
        return sum(divergence.dropped for divergence in self.diverged.values())

    def counts(self) -> dict[str, Any]:
        """The metrics `clients/...` (how many clients, the rank of each that trained), `privacy/...` and so on."""
        ranks = Counter(sorted(rank for _, rank in self.trained))
        own = {"ok": self.ok, "retried": self.retried, "split": self.split, "diverged": len(self.diverged)}
        own |= {f"rank_{rank}": count for rank, count in ranks.items()}
        clients = {f"clients/{name}": count for name, count in own.items()} | {"clients/trained": sorted(self.trained)}
        return clients | self.privacy | self.figures

    def events(self) -> list[str]:
        """One line about the clients that diverged, if some did, and the notes."""
        if not self.diverged:
            return self.notes
        named = [
            f"client {client} ({'dropped' if own.dropped else 'clipped'}: {own.reason})"
            for client, own in islice(self.diverged.items(), NAMED)
        ]
        named += [f"{len(self.diverged) - NAMED} more"] if len(self.diverged) > NAMED else []
        end = "" if self.aggregated else "; all clients were dropped, so the global state stays as it was"
        return [f"round {self.round}: diverged: {', '.join(named)}{end}", *self.notes]


def train_round(
    plan: RunPlan, state: Any, t: int, packs: Sequence[Sequence[Profile]], optimizer: ServerOptimizer,
    downlink: Downlink, executor: Executor, log: RoundLog, objective: ServerObjective | None = None,
) -> Any:  # fmt: skip
    """Trains round ``t`` (from 0) and returns the method's next state. ``packs`` are the cohort, pack by pack.

    ``objective`` is the server half of the plan's objective, and has its next state afterwards; None: it has none.

    If all clients were dropped (`client.on_divergence`), or the cohort is empty, nothing is aggregated: ``state``
    itself is returned, and the optimizer's moments stay. (User-level privacy aggregates noise then.) RunError where
    a pack cannot be trained, where a client diverged and `on_divergence` is `fail`, or where the method does not use
    every update.
    """
    optimizer.lr = scheduled(optimizer.base_lr, plan.server.schedule, t, plan.server.rounds)
    objective = objective or ServerObjective(plan, Path(), executor)
    objective.begin(t)
    if plan.begins_experience(t):  # the moments are those of another loss, and would move rows of past classes
        optimizer.state = {}
    release = plan.privacy.release(plan.method, state, t, optimizer.state) if plan.privacy else None
    arriving: Iterator[Update | PackSum] = _updates(plan, state, t, packs, downlink, executor, log, release, objective)
    if release is not None:
        arriving = release.mean(arriving)
    first = next(arriving, None)
    if plan.privacy is not None:
        _log_privacy(plan, plan.privacy, t, release, log)
    if first is None:
        return state
    stream = chain([first], arriving)
    del first  # an update may be large
    log.aggregated, log.reports = True, release is None and not log.analog
    state = plan.method.aggregate(state, stream, objective.advance(optimizer))
    if next(stream, None) is not None or log.ok + log.dropped + log.truncated < sum(map(len, packs)):
        raise RunError(f"method.name: {type(plan.method).__name__}.aggregate ended before it took every update")
    objective.finish(downlink)
    return state


def _updates(
    plan: RunPlan, state: Any, t: int, packs: Sequence[Sequence[Profile]], downlink: Downlink, executor: Executor,
    log: RoundLog, release: Release | None, objective: ServerObjective,
) -> Iterator[Update | PackSum]:  # fmt: skip
    """Trains the cohort and yields its updates in the order of the packs, whatever the order of arrival.

    With a ``release`` they are clipped.

    A client that was dropped has no update, and a pack of such clients no sum. Where the weights depend on the cohort,
    all uploads are stored as bytes first. Over the air, all updates are one. A method that needs only sums gets one
    sum a pack; its bits do not depend on the process that added it up. Only one decoded upload is in memory at a time,
    and of it only the entries that were sent.
    """
    method = plan.method
    lr = scheduled(plan.client.lr, plan.client.schedule, t, plan.server.rounds)
    air = Transmission(plan.channel, t, log.ledger) if isinstance(plan.channel, OverTheAir) else None
    together = air is not None or plan.weighting.needs is not None or objective.decides_weights
    summed = (
        method.sum_in_worker
        and log.diagnostics is None
        and release is None
        and not (together or objective.needs_clients)
    )
    log.analog = air is not None
    submissions = [_submission(plan, state, t, lr, pack, summed, downlink, objective) for pack in packs]
    arriving = _arriving(plan, packs, submissions, downlink, executor, log, objective)
    if together:
        cohort = [*arriving] if air is None else air.without_weak(arriving)
        if objective.decides_weights:
            cohort = objective.weighed(cohort)
        else:
            cohort, log.figures = weighed(plan, cohort, partial(_decoded, plan, downlink=downlink, objective=objective))
        if air is not None:
            log.truncated, log.ok = air.truncated, log.ok - air.truncated
            yield from air.update(cohort, downlink)
            log.figures |= air.figures()
            return
        arriving = iter(cohort)
    for pack, result in arriving:
        if summed:
            yield from result.summed
            continue
        updates = _decoded(plan, (pack, result), downlink, objective, log)
        updates = updates if release is None else map(release.clipped, updates)
        if method.sum_in_worker:
            changes = ((own.weight, own.sparse_change) for own in updates)
            size = pack[0][1].layout.size
            yield from (PackSum.of(islice(changes, count), size) for count in result.sent)
        else:
            yield from updates


def _arriving(
    plan: RunPlan, packs: Sequence[Sequence[Profile]], submissions: Sequence[Submission], downlink: Downlink,
    executor: Executor, log: RoundLog, objective: ServerObjective,
) -> Iterator[Arrived]:  # fmt: skip
    """Runs the jobs and records their results, in the order of the packs."""
    for done in timed(in_order(executor.run(submissions)), log):
        job, result = cast(TrainJob, submissions[done.index].job), cast(TrainResult, done.result)
        pack = list(zip(packs[done.index], job.orders, strict=True))
        log.retried += done.retries * len(pack)
        log.split += len(pack) if len(result.parts) > 1 else 0
        for i, (client, _) in enumerate(pack):
            log.record(client, result, i, downlink.of(client), objective)
            objective.collect(client.client, result, i)
        if log.diverged and plan.client.on_divergence == "fail":
            raise _failure(log)
        yield pack, result


def _log_privacy(plan: RunPlan, privacy: Privacy, t: int, release: Release | None, log: RoundLog) -> None:
    """Records what the round cost, and whether it is the last one that the budget allows."""
    log.privacy = {"privacy/epsilon": privacy.epsilon(t + 1), **(release.figures() if release else {})}
    if t == 0 and release and (warning := release.warning()):
        log.notes.append(warning)
    if t + 1 == plan.rounds < plan.server.rounds:
        after, target = privacy.epsilon(t + 2), privacy.settings.target_epsilon
        log.notes.append(
            f"the run ends after round {t + 1}: with another one epsilon would be {after:.4g}, over "
            f"privacy.target_epsilon={target:g}"
        )


def _failure(log: RoundLog) -> RunError:
    client, divergence = next(iter(log.diverged.items()))
    return RunError(
        f"round {log.round}, client {client}: {divergence.reason}; lower client.lr or set client.clip_norm; "
        "--resume with client.on_divergence=drop goes on"
    )


def _decoded(
    plan: RunPlan, arrived: Arrived, downlink: Downlink, objective: ServerObjective, log: RoundLog | None = None
) -> Iterator[Update]:
    """Decodes the uploads of a pack's clients, one at a time; with a ``log`` for the last time."""
    pack, result = arrived
    for i, (client, order) in enumerate(pack):
        received, payload, personal = downlink.of(client), result.uploads[i], result.personal[i]
        if log is not None:
            downlink.forget(client)
        if payload is None:
            continue
        upload = wire.decode(plan.channel.deliver(payload))
        change = received.uploadable(order.trainable).placed(upload)
        change = objective.change(client.client, change, result, i)
        stats = {"loss": result.losses[i], "examples": result.examples[i], "steps": result.steps[i]}
        own = None if personal is None else wire.decode(personal).dense()
        update = Update(client, order.weight, received.vector, change, order.layout, stats, own)
        if log is not None and log.diagnostics is not None:
            log.diagnostics.add(update, received.start.merged_base)
        yield update


def timed(stream: Iterator[SubmissionResult], log: RoundLog) -> Iterator[SubmissionResult]:
    """The same results; the time until each arrives is added to ``log.waited``."""
    while True:
        begun = time.perf_counter()
        done = next(stream, None)
        log.waited += time.perf_counter() - begun
        if done is None:
            return
        yield done


def _submission(
    plan: RunPlan, state: Any, t: int, lr: float, pack: Sequence[Profile], summed: bool, downlink: Downlink,
    objective: ServerObjective,
) -> Submission:  # fmt: skip
    """The job of a pack. Clients that share a payload refer to the same entry of the submission's payloads."""
    handles: dict[int, Handle] = {}  # by identity

    def index(handle: Handle) -> int:
        handles.setdefault(id(handle), handle)
        return [*handles].index(id(handle))

    def with_layout(part: tuple[Handle, Layout] | None) -> tuple[int, Layout] | None:
        return part and (index(part[0]), part[1])

    orders = []
    for client in pack:
        received, trainable = downlink.of(client), plan.method.trainable(state, client)
        compared, total = plan.compared_classes(t), len(plan.federation.classes)
        trainable = for_classes(trainable, received.start.layout, plan.model.head, compared, total)
        orders.append(
            ClientOrder(
                client=client.client,
                layout=received.start.layout,
                payload=index(received.handle),
                trainable=trainable,
                budget=received.budget(trainable, client.density_up),
                density_up=client.density_up,
                values=plan.wire.up.values,
                weight=plan.weighting.weight(client),
                known=None if received.known is None else index(received.known),
                base=with_layout(received.base),
                merge=with_layout(received.merge),
                objective=objective.order(client.client, received.uploadable(trainable), index),
            )
        )
    return Submission(TrainJob(t, lr, tuple(orders), summed), tuple(handles.values()))
