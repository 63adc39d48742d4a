"""The rounds of a run, from the first cohort to the exported adapter: one record a round.

The server owns the global state. A round is trained, evaluated, recorded and written before the next one begins. What a
run leaves in its directory is written here or by the sinks, always in this order: the round's metrics, the ledger, then
the checkpoint that vouches for both. So a checkpoint never promises what is not on the disk. Until a round has ended,
everything that the checkpoint of the round before consists of stays as it is: a run that is stopped can still write it.

`time/round_s` is the time from the draw of a cohort to its record, `time/train_s` the time from there to the next
state, and `time/server_s` is the latter without the time spent waiting for clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rayfed import wire
from rayfed.clients.plan import RunPlan
from rayfed.config.load import dump_settings
from rayfed.files import atomic_write, write_json
from rayfed.server import checkpoint as checkpoints
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.chain import link
from rayfed.server.checkpoint import Checkpoint, metrics_checksum
from rayfed.server.client_state import ClientStore, digest_of
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.baselines import measure_baselines
from rayfed.server.evaluation.diagnostics import Diagnostics
from rayfed.server.evaluation.targets import global_changes, round_metrics
from rayfed.server.executor import Executor
from rayfed.server.export import export
from rayfed.server.gossip import gossip_round
from rayfed.server.objective import ServerObjective
from rayfed.server.optimizers import ServerOptimizer
from rayfed.server.pack_size import Choice
from rayfed.server.sampling import RoundCosts, cohort_of, plan_packs
from rayfed.server.star import RoundLog, train_round
from rayfed.server.summary import Progress, closing_table, run_info, summarize
from rayfed.tasks.data.heterogeneity import write_partition
from rayfed.tracking import Sink

Record = dict[str, Any]
Unsaved = tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
"""A checkpoint without the checksums of files, and the tensors of method, server optimizer and objective."""


class Server:
    """Runs a plan whose pack size is known. Iterate `rounds()` to the end, then call `finish()`.

    ``choice``: what `engine.pack: auto` was chosen from. ``on_checkpoint`` is called after every written checkpoint.
    ``goes_on`` is called with every round's record; False ends the run.
    """

    def __init__(
        self, plan: RunPlan, executor: Executor, out: Path, sinks: Sink, resume: bool, choice: Choice | None = None,
        on_checkpoint: Callable[[], None] = lambda: None, goes_on: Callable[[Record], bool] = lambda _: True,
    ) -> None:  # fmt: skip
        assert plan.pack is not None
        self.plan, self.executor, self.out, self.sinks = plan, executor, out, sinks
        self.choice, self.on_checkpoint, self.goes_on = choice, on_checkpoint, goes_on
        self.optimizer = ServerOptimizer(plan.server_optimizer, plan.server)
        self.costs = RoundCosts(plan)
        self.folder, self.store = out / "checkpoints", ClientStore(out / "clients")
        self.objective = ServerObjective(plan, out, executor)
        self.progress, self.base_updates = Progress(), BaseUpdates()
        self.ledger, self.done, self.chain, self.split_reported = wire.Ledger(), 0, "", False
        self._unsaved: Unsaved | None = None
        self.entries = (start := plan.start()).layout.size
        found, self.events = checkpoints.restore(out, plan.digest) if resume else (None, [])
        if found is None:
            self.state = plan.method.init(start, plan.seed)
            self.base_updates.publish(plan.method.base_update(self.state), plan.model.entries)
        else:
            last, self.ledger, self.optimizer.state = found.checkpoint, found.ledger, found.optimizer
            self.state = plan.method.restore(found.method, last.facts, found.clients)
            self.objective.restore(found.objective, found.objective_clients)
            self.base_updates, self.progress = BaseUpdates.from_json(last.base_updates), Progress(**last.progress)
            self.done, self.chain, executor.capability = last.round, last.chain, last.capability or executor.capability

    def rounds(self) -> Iterator[Record]:
        """Runs the rounds that are left and yields each one's record (the keys of metrics.jsonl)."""
        atomic_write(self.out / "config.yaml", dump_settings(dict(self.plan.settings)))  # now it can be resumed
        write_partition(self.out, self.plan.federation)
        if self.choice:
            write_json(self.out / "pack.json", asdict(self.choice))
            self.events.insert(0, f"engine.pack=auto: packs of {self.choice.size} (a step: {self.choice.time_model()})")
        self.sinks.start(run_info(self.plan, self.out, self.entries, self.done))
        for text in self.events:
            self.sinks.event(text)
        self.executor.subscribe(self.sinks.event)
        for t in range(self.done, self.plan.rounds):
            if self.progress.stopped:
                return
            record, dense_bytes = self._round(t)
            self.progress.add(record, self.plan.task.metric, dense_bytes, self.plan.eval.early_stop, self.plan.server)
            self.done = t + 1
            self._unsaved = self._checkpoint(record["state/digest"])
            if record["clients/split"] and not self.split_reported:
                self.split_reported = True
                self.sinks.event("some packs do not fit into memory and are split; lower engine.pack to save the try")
            self.sinks.round(record)
            if not self.goes_on(record):
                self.progress.stopped = True
                self._unsaved = self._checkpoint(record["state/digest"])  # again: it says that the run has ended
            last = self.progress.stopped or self.done == self.plan.rounds
            if last or self.done % self.plan.checkpoint.every == 0:
                self.save()
            yield record

    def finish(self) -> Record:
        """Measures the baselines where asked for, exports the adapter, and returns the summary."""
        plan, changes, head = self.plan, global_changes(self.plan.method, self.state), self.plan.method.head(self.state)
        baselines = measure_baselines(plan, self.done, self.executor) if plan.eval.controls else None
        summary = summarize(plan, self.progress, self.ledger, self.done, baselines)
        summary |= export(plan, self.out, changes, head, summary, self.executor)
        self.sinks.finish(summary, closing_table(plan, summary, self.progress.ranks))
        return summary

    def save(self) -> None:
        """Writes the last finished round's checkpoint, and before it the ledger, unless that has been done."""
        if self._unsaved is None:
            return
        checkpoint, tensors, moments, objective = self._unsaved
        self.ledger.write(self.out / "ledger.parquet", checkpoint.round)
        metrics, capability = metrics_checksum(self.out, checkpoint.round), self.executor.capability
        checkpoint = replace(checkpoint, ledger=self.ledger.checksum, metrics=metrics, capability=capability)
        checkpoints.save(self.folder, checkpoint, tensors, moments, self.plan.checkpoint.keep, objective)
        self._unsaved = None
        if checkpoint.clients or checkpoint.objective_clients:
            checkpoints.prune_clients(self.folder, self.store, self.objective.store)
        self.on_checkpoint()

    def _checkpoint(self, digest: str) -> Unsaved:
        """The finished round's checkpoint."""
        checkpoint = Checkpoint(
            round=self.done,
            experiment=self.plan.digest,
            digest=digest,
            chain=self.chain,
            facts=self.state.facts(),
            progress=asdict(self.progress),
            base_updates=self.base_updates.to_json(),
            clients=self.store.to_json(self.state.clients),
            objective_clients=self.objective.store.to_json(self.objective.clients),
        )
        return checkpoint, self.state.tensors(), dict(self.optimizer.state), self.objective.state

    def _round(self, t: int) -> tuple[Record, int]:
        """Trains and evaluates round ``t`` (from 0): its record, and its messages' bytes had they been dense fp32."""
        begun = time.perf_counter()
        plan, sizes = self.plan, self.plan.federation_at(t).sizes
        clients = [plan.profiles.profile(c, int(sizes[c]), t) for c in cohort_of(plan, t)]
        assert plan.pack is not None
        packs = plan_packs(clients, plan.pack, self.costs.at(t))
        downlink = Downlink(plan, self.state, t, self.executor)
        diagnostics = Diagnostics() if plan.eval.diagnostics else None
        log = RoundLog(t + 1, self.ledger, self.base_updates, diagnostics=diagnostics)
        one_round = gossip_round if plan.topology else train_round
        state = one_round(plan, self.state, t, packs, self.optimizer, downlink, self.executor, log, self.objective)
        for text in log.events():
            self.sinks.event(text)
        self.state = replace(state, clients=self.store.save(state.clients, t + 1)) if state.clients else state
        self.objective.save(t + 1)
        if log.aggregated:  # otherwise the state, and its last base update, are those of an earlier round
            self.base_updates.publish(plan.method.base_update(self.state), plan.model.entries)
        seconds = time.perf_counter() - begun
        metrics = round_metrics(plan, self.state, t, downlink, self.executor, self.ledger.total_bytes)
        stored = digest_of(self.state.clients) + digest_of(self.objective.clients)
        own = (self.state.tensors(), self.optimizer.state, stored, self.objective.state)
        digest = checkpoints.state_digest(t + 1, *own)
        self.chain = link(self.chain, plan.digest, self.ledger.rows(t + 1, t + 1), digest)
        record = {
            "round": t + 1,
            "train/loss": log.mean_loss,
            **metrics,
            **self.ledger.totals(t + 1),
            "bytes/total": self.ledger.total_bytes,
            "time/round_s": time.perf_counter() - begun,
            "time/train_s": seconds,
            "time/server_s": seconds - log.waited,
            **log.counts(),
            **{f"method/{name}": value for name, value in self.state.report.items() if log.reports},
            **(diagnostics.report(plan, self.state, t, self.executor) if diagnostics else {}),
            "state/digest": digest,
            "state/chain": self.chain,
        }
        return record, log.dense
