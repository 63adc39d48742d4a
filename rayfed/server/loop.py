"""The rounds of a run, from the first cohort to the exported adapter, one record a round.

The server owns the global state; it asks a `Crew` to train and evaluate and never looks at who did it. What a run
leaves in its directory is written here or by the sinks it is given, always in this order: the round's metrics, the
ledger, then the checkpoint that vouches for both. So a checkpoint never promises what is not on the disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rayfed import wire
from rayfed.clients.blueprint import Blueprint
from rayfed.clients.profiles import describe, profile, rank_mix
from rayfed.config import Experiment, dump_config
from rayfed.files import atomic_write, write_json
from rayfed.lora.adapter import Layout, LowRank, flatten_changes
from rayfed.server import checkpoint as checkpoints
from rayfed.server.axes import rate, resolve
from rayfed.server.catchup import CatchUp
from rayfed.server.control import Controls, measure_controls
from rayfed.server.crew import Crew
from rayfed.server.diagnostics import Diagnostics
from rayfed.server.downlink import Downlink
from rayfed.server.evaluate import evaluate, features
from rayfed.server.export import export
from rayfed.server.memory import ClientStore, digest_of
from rayfed.server.pack_size import measured_choice
from rayfed.server.packs import client_costs, plan_packs
from rayfed.server.per_client import client_metrics
from rayfed.server.round import Books, Tally, updates
from rayfed.server.sampling import cohort
from rayfed.server.states import informed
from rayfed.server.stopping import Progress
from rayfed.server.summary import closing_table, summarize
from rayfed.server.tiers import tier_models
from rayfed.tasks.federation import Federation
from rayfed.tasks.lowrank import Problem, loss, share
from rayfed.tracking import RunInfo, Sink

Record = dict[str, Any]


class Server:
    """Runs one experiment. Iterate `rounds()` to the end, then call `finish()`."""

    def __init__(
        self, experiment: Experiment, federation: Federation, blueprint: Blueprint, crew: Crew, out: Path, sinks: Sink,
        resume: bool,
    ) -> None:  # fmt: skip
        self.choice = None
        if experiment.engine.pack == "auto":
            self.choice = measured_choice(experiment, federation, crew)
            experiment = experiment.with_pack(self.choice.size)
        self.experiment, self.federation, self.blueprint = experiment, federation, blueprint
        self.crew, self.out, self.sinks = crew, out, sinks
        self.axes = resolve(experiment)
        self.settings_digest = experiment.digest()
        self.folder = out / "checkpoints"
        start = blueprint.start(experiment)
        self.layout = start.layout
        self.progress = Progress()
        self.ledger, self.catchup = wire.Ledger(), CatchUp()
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
            self.catchup = CatchUp.from_json(found.catchup)
            self.done = found.round
            self.ledger = wire.Ledger.read(out / "ledger.parquet", up_to_round=self.done)

    def info(self) -> RunInfo:
        """What the sinks are told at the start."""
        sizes = self.federation.sizes
        facts: dict[str, float | int | str | None] = {
            "clients": self.federation.clients,
            "clients without data": int((sizes == 0).sum()),
            "training rows": int(sizes.sum()),
            "trainable parameters": self.layout.size,
            "frozen parameters": self.blueprint.parameters,
            "base in": self.experiment.model.dtype,
            "padding": str(self.blueprint.padding),
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
        self.crew, kept = informed(self.crew, self.experiment, self.federation, self.blueprint)
        if kept:
            self.sinks.event(kept)
        told = False
        while self.done < self.experiment.server.rounds and not self.progress.stopped:
            record = self._round(self.done)
            self.done += 1
            self.sinks.round(record)
            for text in self.crew.drain_events():
                self.sinks.event(text)
            if record["clients/split"] and not told:
                told = True
                self.sinks.event("some packs do not fit into memory and are split; a smaller engine.pack saves the try")
            last = self.done == self.experiment.server.rounds or self.progress.stopped
            if last or self.done % self.experiment.checkpoint.every == 0:
                self._checkpoint(record["state/digest"])
            yield record

    def finish(self) -> Record:
        """Exports the adapter, closes the books, tells the sinks; returns the summary."""
        head = {**self.blueprint.frozen_head, **self.axes.method.head(self.state)}
        classes = self.federation.classes
        exported = export(self.out, self._changes(), head, self.blueprint, self.experiment, classes)
        controls = self._controls() if self.experiment.eval.controls else None
        summary = summarize(self.progress, self.ledger, self.done, controls)
        summary |= exported
        self.sinks.finish(summary, closing_table(self.experiment, summary))
        return summary

    def _round(self, t: int) -> Record:
        begun = time.perf_counter()
        experiment, axes = self.experiment, self.axes
        total = experiment.server.rounds
        axes.optimizer.lr = rate(axes.optimizer.base_lr, experiment.server.schedule, t, total)
        lr = rate(experiment.client.lr, experiment.client.schedule, t, total)
        sizes = self.federation.sizes
        drawn = cohort(self.federation.holders, experiment.server.cohort, experiment.seed, t)
        clients = [profile(c, int(sizes[c]), experiment, t) for c in drawn]
        downlink = Downlink(axes.method, self.state, experiment.wire.down.values, self.crew)
        watch = Diagnostics() if experiment.eval.diagnostics else None
        books = Books(self.ledger, self.catchup, Tally(), watch)
        assert experiment.engine.pack != "auto"
        packs = plan_packs(clients, experiment.engine.pack, self.costs)
        stream = updates(axes.method, self.state, t, lr, packs, axes.weights, experiment, self.crew, downlink, books)
        state = axes.method.aggregate(self.state, stream, axes.optimizer.advance)
        self.state = replace(state, clients=self.store.settle(state.clients, t + 1)) if state.clients else state
        self.catchup.publish(axes.method.news(self.state), self.blueprint.entries)
        trained = time.perf_counter()
        metrics = self._evaluate(t, downlink)
        self.progress.see(t + 1, metrics, experiment.eval.early_stop)
        tally = books.tally
        self.progress.dense_bytes += tally.dense
        digest = checkpoints.state_digest(
            t + 1, self.state.tensors(), axes.optimizer.state, digest_of(self.state.clients)
        )
        return {
            "round": t + 1,
            "train/loss": tally.loss / tally.examples,
            **metrics,
            **self.ledger.totals(t + 1),
            "bytes/total": self.ledger.total_bytes,
            "time/round_s": time.perf_counter() - begun,
            "time/train_s": trained - begun,
            "time/server_s": trained - begun - tally.waited,
            "clients/ok": tally.ok,
            "clients/retried": tally.retried,
            "clients/split": tally.split,
            **{f"clients/rank_{rank}": count for rank, count in sorted(tally.ranks.items())},
            **{f"method/{name}": value for name, value in self.state.report.items()},
            **(watch.report(axes.method, self.state) if watch else {}),
            "state/digest": digest,
        }

    def _evaluate(self, t: int, downlink: Downlink) -> dict[str, float | None]:
        """The dense global model, and the sparse one under the mask its clients were sent at the round's start."""
        settings = self.experiment.eval
        if self.federation.problem is not None:
            return self._measure(self.federation.problem)
        names = [f"{s}/{m}{x}" for s in ("eval", "test") for m in ("loss", "accuracy") for x in ("", "_masked")]
        metrics: dict[str, float | None] = dict.fromkeys(names)
        if (t + 1) % settings.every and t + 1 < self.experiment.server.rounds:
            return metrics
        vector, layout = self._model()
        models = {"": (vector, layout)}
        sent = downlink.first
        # Where clients of a round receive different adapters, none of them is "the sparse model".
        if (
            settings.masked
            and sent
            and sent.has is not None
            and sent.start.layout == layout
            and sent.start.held is None
        ):
            models["_masked"] = vector * sent.has, layout
        if settings.tiers:
            sizes = self.federation.sizes
            models |= tier_models(self.axes.method, self.state, self.experiment, sizes, t, self.crew)
        metrics |= evaluate(self.crew, self.federation, models, ("validation", "test"), settings.batch_size)
        if settings.clients:
            method, state = self.axes.method, self.state
            metrics |= client_metrics(method, state, self.experiment, self.federation, t, self.crew)
        return metrics

    def _measure(self, problem: Problem) -> dict[str, float | None]:
        """Where the answer is known: F(W) and the share of the initial gap F(0) - F(W*) that is left."""
        (change,) = self._changes().values()
        W = (change.dense() if isinstance(change, LowRank) else change).double().numpy()
        return {"eval/loss": loss(problem, W), "eval/gap": share(problem, W)}

    def _model(self) -> tuple[Tensor, Layout]:
        """The global model: every layer's change and the head, as one vector with its layout."""
        return flatten_changes(self._changes(), self.axes.method.head(self.state))

    def _changes(self) -> dict[str, LowRank | Tensor]:
        method = self.axes.method
        return {name: method.delta(self.state, name) for name in method.layers(self.state)}

    def _checkpoint(self, digest: str) -> None:
        self.ledger.write(self.out / "ledger.parquet")
        record = checkpoints.Checkpoint(
            self.done,
            self.settings_digest,
            digest,
            self.state.facts(),
            self.progress.to_json(),
            self.catchup.to_json(),
            self.store.to_json(self.state.clients),
        )
        keep = self.experiment.checkpoint.keep
        checkpoints.save(self.folder, record, self.state.tensors(), self.axes.optimizer.state, keep)
        if self.state.clients:
            self.store.prune(checkpoints.client_rows(self.folder))

    def _controls(self) -> Controls:
        size = self.experiment.eval.batch_size
        train, test = (features(self.crew, self.federation, split, size) for split in ("train", "test"))
        validation = None
        if len(self.federation.validation):
            validation = features(self.crew, self.federation, "validation", size)
        head = self.blueprint.head
        return measure_controls(self.experiment, self.federation, head, train, validation, test, self.done)
