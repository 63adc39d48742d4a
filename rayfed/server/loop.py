"""The rounds of a run, from the first cohort to the exported adapter, one record a round.

The server owns the global state; it asks a `Executor` to train and evaluate and never looks at who did it. What a run
leaves in its directory is written here or by the sinks it is given, always in this order: the round's metrics, the
ledger, then the checkpoint that vouches for both. So a checkpoint never promises what is not on the disk.

`time/round_s` is the time from a round's begin to its record, `time/train_s` what it takes from the draw of the cohort
to the next state, and `time/server_s` that without the waiting for clients.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfed import wire
from rayfed.config import Experiment, dump_config
from rayfed.files import atomic_write, write_json
from rayfed.profiles.client_profiles import describe, profile, rank_mix
from rayfed.server import checkpoint as checkpoints
from rayfed.server.axes import rate, resolve
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.checkpoint import Checkpoint
from rayfed.server.client_state import ClientStore, digest_of
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.baselines import Controls, measure_controls
from rayfed.server.evaluation.diagnostics import Diagnostics
from rayfed.server.evaluation.evaluate import features
from rayfed.server.evaluation.targets import changes, evaluation_targets
from rayfed.server.executor import Executor, results
from rayfed.server.export import export
from rayfed.server.pack_size import measured_choice
from rayfed.server.sampling import client_costs, cohort, plan_packs
from rayfed.server.star import RoundLog, RoundStats, updates
from rayfed.server.summary import Progress, closing_table, summarize
from rayfed.tasks.federation import Federation
from rayfed.tasks.models.spec import ModelSpec
from rayfed.tracking import RunInfo, Sink

Record = dict[str, Any]


class Server:
    """Runs one experiment. Iterate `rounds()` to the end, then call `finish()`."""

    def __init__(
        self, experiment: Experiment, federation: Federation, model_spec: ModelSpec, executor: Executor, out: Path, sinks: Sink,
        resume: bool,
    ) -> None:  # fmt: skip
        self.choice = None
        if experiment.engine.pack == "auto":
            self.choice = measured_choice(experiment, federation, executor)
            experiment = experiment.with_pack(self.choice.size)
        self.experiment, self.federation, self.model_spec = experiment, federation, model_spec
        self.executor, self.out, self.sinks = executor, out, sinks
        self.axes = resolve(experiment)
        self.settings_digest = experiment.digest()
        self.folder = out / "checkpoints"
        start = model_spec.start(experiment)
        self.layout = start.layout
        self.progress = Progress()
        self.base_updates = BaseUpdates()
        self.store = ClientStore(out / "clients")
        self.costs = client_costs(federation, experiment.client)
        found = checkpoints.latest(self.folder, self.settings_digest) if resume else None
        if found is None:
            self.state = self.axes.method.init(start, experiment.seed)
            self.done = 0
        else:
            clients = self.store.restore(found.clients)
            method, optimizer = checkpoints.load_tensors(self.folder, found, digest_of(clients))
            self.state = self.axes.method.restore(method, found.facts, clients)
            self.axes.optimizer.load(optimizer)
            self.progress = Progress(**found.progress)
            self.base_updates = BaseUpdates.from_json(found.base_updates)
            self.done = found.round
        self.ledger = wire.Ledger.resume(out / "ledger.parquet", self.done)

    def info(self) -> RunInfo:
        """What the sinks are told at the start."""
        sizes = self.federation.sizes
        facts: dict[str, float | int | str | None] = {
            "clients": self.federation.clients,
            "clients without data": int((sizes == 0).sum()),
            "training rows": int(sizes.sum()),
            "trainable parameters": self.layout.size,
            "frozen parameters": self.model_spec.parameters,
            "base in": self.experiment.model.dtype,
            "padding": str(self.model_spec.padding),
            "ranks": describe(rank_mix(self.experiment, sizes)),
        }
        return RunInfo(
            name=self.experiment.name,
            out=self.out,
            digest=self.settings_digest,
            config=self.experiment.model_dump(mode="json"),
            rounds=self.experiment.server.rounds,
            start=self.done,
            facts=facts,
        )

    def rounds(self) -> Iterator[Record]:
        """Runs the rounds that are left and yields each one's record (the keys of metrics.jsonl)."""
        # First of all: a folder with a config.yaml is a run that can be resumed.
        atomic_write(self.out / "config.yaml", dump_config(self.experiment))
        if self.choice:
            write_json(self.out / "pack.json", self.choice.to_json())
        self.sinks.start(self.info())
        if self.choice:
            self.sinks.event(f"engine.pack=auto: packs of {self.choice.size} (a step: {self.choice.time_model()})")
        told = False
        for t in range(self.done, self.experiment.server.rounds):
            if self.progress.stopped:
                return
            record, dense = self._round(t)
            self.done = record["round"]
            self.progress.see(self.done, record, self.experiment.eval.early_stop)
            self.progress.dense_bytes += dense
            self.sinks.round(record)
            for text in self.executor.drain_events():
                self.sinks.event(text)
            if record["clients/split"] and not told:
                told = True
                self.sinks.event("some packs do not fit into memory and are split; a smaller engine.pack saves the try")
            if self.progress.stopped or self._due(self.done):
                self._save(record["state/digest"])
            yield record

    def finish(self) -> Record:
        """Exports the adapter, closes the log, tells the sinks; returns the summary."""
        head = {**self.model_spec.frozen_head, **self.axes.method.head(self.state)}
        classes = self.federation.classes
        model = changes(self.axes.method, self.state)
        exported = export(self.out, model, head, self.model_spec, self.experiment, classes)
        controls = self._controls() if self.experiment.eval.controls else None
        summary = summarize(self.progress, self.ledger, self.done, controls)
        summary |= exported
        self.sinks.finish(summary, closing_table(self.experiment, summary))
        return summary

    def _round(self, t: int) -> tuple[Record, int]:
        """Trains and evaluates round ``t`` (from 0): its record, and its messages' bytes had they been dense fp32."""
        begun = time.perf_counter()
        experiment, axes = self.experiment, self.axes
        total = experiment.server.rounds
        axes.optimizer.lr = rate(axes.optimizer.base_lr, experiment.server.schedule, t, total)
        lr = rate(experiment.client.lr, experiment.client.schedule, t, total)
        sizes = self.federation.sizes
        drawn = cohort(self.federation.holders, experiment.server.cohort, experiment.seed, t)
        clients = [profile(c, int(sizes[c]), experiment, t) for c in drawn]
        downlink = Downlink(axes.method, self.state, experiment.wire.down.values, self.executor)
        watch = Diagnostics() if experiment.eval.diagnostics else None
        log = RoundLog(self.ledger, self.base_updates, RoundStats(), watch)
        assert experiment.engine.pack != "auto"
        packs = plan_packs(clients, experiment.engine.pack, self.costs)
        stream = updates(
            axes.method, self.state, t, lr, packs, axes.weights, experiment, self.executor.run, downlink, log
        )
        state = axes.method.aggregate(self.state, stream, axes.optimizer.advance)
        self.state = replace(state, clients=self.store.save(state.clients, t + 1)) if state.clients else state
        self.base_updates.publish(axes.method.base_update(self.state), self.model_spec.entries)
        seconds = time.perf_counter() - begun
        known, evaluation = evaluation_targets(
            axes.method, self.state, experiment, self.federation, t, downlink, self.executor
        )
        found = evaluation.metrics(results(self.executor.run(evaluation.tasks)))
        stats = log.stats
        digest = checkpoints.state_digest(
            t + 1, self.state.tensors(), axes.optimizer.state, digest_of(self.state.clients)
        )
        record = {
            "round": t + 1,
            "train/loss": stats.loss / stats.examples,
            **known,
            **found,
            **self.ledger.totals(t + 1),
            "bytes/total": self.ledger.total_bytes,
            "time/round_s": time.perf_counter() - begun,
            "time/train_s": seconds,
            "time/server_s": seconds - stats.waited,
            "clients/ok": stats.ok,
            "clients/retried": stats.retried,
            "clients/split": stats.split,
            **{f"clients/rank_{rank}": count for rank, count in sorted(stats.ranks.items())},
            **{f"method/{name}": value for name, value in self.state.report.items()},
            **(watch.report(axes.method, self.state) if watch else {}),
            "state/digest": digest,
        }
        return record, stats.dense

    def _due(self, round: int) -> bool:
        """Is there to be a checkpoint after ``round`` (from 1)?"""
        return round == self.experiment.server.rounds or round % self.experiment.checkpoint.every == 0

    def _save(self, digest: str) -> None:
        """Writes the newest round's checkpoint, and the ledger that it vouches for."""
        checkpoint = Checkpoint(
            self.done,
            self.settings_digest,
            digest,
            self.state.facts(),
            self.progress.to_json(),
            self.base_updates.to_json(),
            self.store.to_json(self.state.clients),
        )
        self.ledger.write(self.out / "ledger.parquet")
        keep = self.experiment.checkpoint.keep
        checkpoints.save(self.folder, checkpoint, self.state.tensors(), self.axes.optimizer.state, keep)
        if checkpoint.clients:
            self.store.prune(checkpoints.client_rows(self.folder))

    def _controls(self) -> Controls:
        size = self.experiment.eval.batch_size
        train, test = (features(self.executor, self.federation, split, size) for split in ("train", "test"))
        validation = None
        if len(self.federation.validation):
            validation = features(self.executor, self.federation, "validation", size)
        head = self.model_spec.head
        return measure_controls(self.experiment, self.federation, head, train, validation, test, self.done)
