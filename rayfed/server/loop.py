"""The rounds of a run, from the first cohort to the exported adapter, one record a round.

The server owns the global state; it asks a `Crew` to train and evaluate and never looks at who did it. What a run
leaves in its directory is written here or by the sinks it is given, always in this order: the round's metrics, the
ledger, then the checkpoint that vouches for both. So a checkpoint never promises what is not on the disk.

Where the next round does not depend on it, a round is evaluated beside the next one's training, by workers that have no
clients left, and written down once the next is trained. Every figure is the one that evaluating at once gives, but for
the times. `time/round_s` is the time from a round's begin to the next one's, so the rounds add up to the run: the work
of evaluating and writing down is in the round that it is done in. `time/train_s` is what it takes from the draw of the
cohort to the next state, and `time/server_s` that without the waiting for clients.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rayfed import wire
from rayfed.clients.blueprint import Blueprint
from rayfed.clients.jobs import Result
from rayfed.clients.profiles import describe, profile, rank_mix
from rayfed.config import Experiment, dump_config
from rayfed.files import atomic_write, write_json
from rayfed.server import checkpoint as checkpoints
from rayfed.server.axes import rate, resolve
from rayfed.server.catchup import CatchUp
from rayfed.server.checkpoint import Checkpoint, Snapshot
from rayfed.server.control import Controls, measure_controls
from rayfed.server.crew import Beside, Crew, Task, results
from rayfed.server.diagnostics import Diagnostics
from rayfed.server.downlink import Downlink
from rayfed.server.evaluate import Evaluation, features
from rayfed.server.export import export
from rayfed.server.memory import ClientStore, digest_of
from rayfed.server.pack_size import measured_choice
from rayfed.server.packs import client_costs, plan_packs
from rayfed.server.questions import changes, questions
from rayfed.server.round import Books, Tally, updates
from rayfed.server.sampling import cohort
from rayfed.server.states import informed
from rayfed.server.stopping import Progress
from rayfed.server.summary import closing_table, summarize
from rayfed.server.trained import Record, Trained
from rayfed.tasks.federation import Federation
from rayfed.tracking import RunInfo, Sink


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
        self.catchup = CatchUp()
        self.store = ClientStore(out / "clients")
        self.overlap = experiment.engine.kind == "ray"  # in one process nobody idles, and each record comes sooner
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
        self.ledger = wire.Ledger.resume(out / "ledger.parquet", self.done)

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
        for trained in self._evaluated():
            record = trained.record
            self.done = record["round"]
            self.progress.see(self.done, record, self.experiment.eval.early_stop)
            self.progress.dense_bytes += trained.dense
            self.sinks.round(record)
            for text in self.crew.drain_events():
                self.sinks.event(text)
            if record["clients/split"] and not told:
                told = True
                self.sinks.event("some packs do not fit into memory and are split; a smaller engine.pack saves the try")
            if self.progress.stopped or self._due(self.done):
                self._write(trained.snapshot or self._snapshot(trained))
            yield record

    def finish(self) -> Record:
        """Exports the adapter, closes the books, tells the sinks; returns the summary."""
        head = {**self.blueprint.frozen_head, **self.axes.method.head(self.state)}
        classes = self.federation.classes
        model = changes(self.axes.method, self.state)
        exported = export(self.out, model, head, self.blueprint, self.experiment, classes)
        controls = self._controls() if self.experiment.eval.controls else None
        summary = summarize(self.progress, self.ledger, self.done, controls)
        summary |= exported
        self.sinks.finish(summary, closing_table(self.experiment, summary))
        return summary

    def _evaluated(self) -> Iterator[Trained]:
        """Trains the rounds that are left and yields each when its figures are there: at once, or after the next."""
        owed: Trained | None = None
        begun = time.perf_counter()
        for t in range(self.done, self.experiment.server.rounds):
            if self.progress.stopped:
                return
            try:
                trained, answers = self._round(t, owed.evaluation.tasks if owed else ())
            except Exception as failure:
                if owed:
                    yield self._in_spite_of(failure, owed)
                raise
            if owed:
                yield owed.evaluated(answers)
            waits = self._may_wait(t, trained.evaluation)
            if not waits:
                trained = trained.evaluated(results(self.crew.run(trained.evaluation.tasks)))
            elif self._due(t + 1):
                trained = replace(trained, snapshot=self._snapshot(trained, kept=True))
            now = time.perf_counter()
            trained.record["time/round_s"], begun = now - begun, now
            if not waits:
                yield trained
            owed = trained if waits else None

    def _in_spite_of(self, failure: Exception, owed: Trained) -> Trained:
        """Evaluates a round though the next one failed: a run that fails there every time still comes this far."""
        try:
            return owed.evaluated(results(self.crew.run(owed.evaluation.tasks)))
        except Exception:
            raise failure from None

    def _may_wait(self, t: int, evaluation: Evaluation) -> bool:
        """May round ``t`` be evaluated beside the next one's training? Not where that depends on what is found."""
        last = t + 1 == self.experiment.server.rounds
        return self.overlap and bool(evaluation.tasks) and not last and self.experiment.eval.early_stop is None

    def _round(self, t: int, further: Sequence[Task]) -> tuple[Trained, list[Result]]:
        """Trains round ``t`` (from 0). Workers with no clients left do ``further``, whose results come second."""
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
        crew = Beside(self.crew, further)
        stream = updates(axes.method, self.state, t, lr, packs, axes.weights, experiment, crew.run, downlink, books)
        state = axes.method.aggregate(self.state, stream, axes.optimizer.advance)
        self.state = replace(state, clients=self.store.settle(state.clients, t + 1)) if state.clients else state
        self.catchup.publish(axes.method.news(self.state), self.blueprint.entries)
        seconds = time.perf_counter() - begun
        answers = crew.rest()
        known, evaluation = questions(axes.method, self.state, experiment, self.federation, t, downlink, self.crew)
        tally = books.tally
        digest = checkpoints.state_digest(
            t + 1, self.state.tensors(), axes.optimizer.state, digest_of(self.state.clients)
        )
        record = {
            "round": t + 1,
            "train/loss": tally.loss / tally.examples,
            **known,
            **self.ledger.totals(t + 1),
            "bytes/total": self.ledger.total_bytes,
            "time/round_s": None,  # not yet
            "time/train_s": seconds,
            "time/server_s": seconds - tally.waited,
            "clients/ok": tally.ok,
            "clients/retried": tally.retried,
            "clients/split": tally.split,
            **{f"clients/rank_{rank}": count for rank, count in sorted(tally.ranks.items())},
            **{f"method/{name}": value for name, value in self.state.report.items()},
            **(watch.report(axes.method, self.state) if watch else {}),
            "state/digest": digest,
        }
        return Trained(record, evaluation, tally.dense), answers

    def _due(self, round: int) -> bool:
        """Is there to be a checkpoint after ``round`` (from 1)?"""
        return round == self.experiment.server.rounds or round % self.experiment.checkpoint.every == 0

    def _snapshot(self, trained: Trained, kept: bool = False) -> Snapshot:
        """The newest round's checkpoint, but for what is told at its end: `Progress`.

        What is ``kept`` while the next round trains is a copy where that changes things in place.
        """
        state, moments = self.state, self.axes.optimizer.state
        if kept:
            moments = {name: tensor.clone() for name, tensor in moments.items()}
        checkpoint = Checkpoint(
            trained.record["round"],
            self.settings_digest,
            trained.record["state/digest"],
            state.facts(),
            catchup=self.catchup.to_json(),
            clients=self.store.to_json(state.clients),
        )
        return Snapshot(checkpoint, state.tensors(), moments)

    def _write(self, snapshot: Snapshot) -> None:
        checkpoint = replace(snapshot.checkpoint, progress=self.progress.to_json())
        self.ledger.write(self.out / "ledger.parquet")
        keep = self.experiment.checkpoint.keep
        checkpoints.save(self.folder, checkpoint, snapshot.method, snapshot.optimizer, keep)
        if checkpoint.clients:
            self.store.prune(checkpoints.client_rows(self.folder), checkpoint.round)

    def _controls(self) -> Controls:
        size = self.experiment.eval.batch_size
        train, test = (features(self.crew, self.federation, split, size) for split in ("train", "test"))
        validation = None
        if len(self.federation.validation):
            validation = features(self.crew, self.federation, "validation", size)
        head = self.blueprint.head
        return measure_controls(self.experiment, self.federation, head, train, validation, test, self.done)
