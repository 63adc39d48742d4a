"""FLASC-Search over real runs: probes in stages on Ray Tune, decisions replayed from the trials' directories.

Why stages and no searcher of Tune's: nothing can be suggested until all neighbours of a step have ended, so a searcher
would wait exactly where a stage ends; and a searcher has a memory of its own, where here the directories are the truth.
A resumed search reads the finished probes, comes to the same decisions, and runs what is missing. The price is that
every stage starts its trials' processes anew (Ray itself only once).

A probe is a run directory like any other trial's, except that all but the first start from the last checkpoint of the
probe that was kept (`continues.json` there says which, see `rayfed.sweeps.graft`); its metrics and bytes include those
rounds. Probes train at a constant rate (after the file's own warm-up): they do not know their end. The final run starts
from nothing and follows the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.files import atomic_write
from rayfed.sweeps.books import Books, run_trials, to_run
from rayfed.sweeps.graft import check_growing
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.space import Point
from rayfed.sweeps.table import Line, line_of, reported, spread
from rayfed.sweeps.trial import outcome
from rayfed.sweeps.walk import Probe, Walk, decision, described, neighbours, walk
from rayfed.tracking import Table
from rayfed.tracking.jsonl import to_line

FINAL = "final"


class Search:
    """Plans, checks and runs the search of a sweep in the directory ``out``. UserError where something is wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        assert sweep.search is not None
        self.settings, self.sweep, self.search, self.out = settings, sweep, sweep.search, out
        self.tried: set[str] = set()  # by this process: what failed before it is tried again
        self.trials: dict[str, Trial] = {}
        self.on_ray = False
        search = self.search
        first = Probe(("start",), search.rank, search.density, search.density, search.rounds)
        largest = first
        while by_rank := [probe for probe in neighbours(largest, search) if probe.path[-1] == "rank"]:
            largest = by_rank[0]
        # What differs between probes is checked at both ends of the ranks; every density in (0, 1] is right.
        checked = [self.trial(first), self.trial(largest), self.final(first)]
        check_growing(checked[0].experiment)
        self.federations = check_trials(checked, sweep)
        experiment = checked[-1].experiment
        self.cohort, self.source = experiment.server.cohort, experiment.data.source
        self.reserve = experiment.server.rounds if search.final else 0
        self._check_budget(first)
        self.walk()  # the directories were made with these settings, or it is refused

    def _check_budget(self, first: Probe) -> None:
        budget, rounds = self.search.budget, self.search.rounds
        step = len(neighbours(first, self.search)) + self.search.stay
        least = rounds * (1 + step) + self.reserve
        if budget is not None and budget < least:
            final = f" and {self.reserve} for the final run (server.rounds)" if self.reserve else ""
            raise UserError(
                f"sweep.search.budget: got {budget}, but the first step alone needs {least} rounds: {1 + step} probes "
                f"of {rounds}{final}"
            )

    def run(self, books: Books) -> None:
        """Runs what is missing, step by step, to the end of the search."""
        with ExitStack() as ray:
            while (at := self._write(books)).ended is None:
                todo = self._to_run(self.trial(probe) for probe in at.now)
                if not todo:
                    return  # something has no record although it ran: the sweep is not finished
                books.say(f"search {self.out}: step {_number(at)}, to run: {', '.join(trial.name for trial in todo)}")
                self._run(todo, books, ray)
            books.say(f"search: {_verdict(at)}: {at.ended}")
            if self.search.final and self.metric(at.kept) is not None:
                self._run(self._to_run([self.final(at.kept)]), books, ray)
                self._write(books)

    def _run(self, trials: Sequence[Trial], books: Books, ray: ExitStack) -> None:
        if trials and not self.on_ray:
            from rayfed.sweeps.on_tune import on_ray

            ray.enter_context(on_ray(trials))  # not anew for every stage: all trials ask for the same
            self.on_ray = True
        run_trials(trials, self.sweep, self.out, self.federations, books)

    def _to_run(self, trials: Iterable[Trial]) -> list[Trial]:
        todo = to_run(self.out, [trial for trial in trials if trial.name not in self.tried])
        self.tried |= {trial.name for trial in todo}
        return todo

    def trial(self, probe: Probe) -> Trial:
        """The probe's trial: a constant rate, and no controls beside it."""
        overrides = {key: value for key, value in described(probe).items() if "." in key}
        overrides |= {"server.rounds": probe.rounds, "eval.controls": False}
        overrides |= {f"{side}.schedule.kind": "constant" for side in ("client", "server")}
        return replace(self._trial(probe.name, overrides), continues=probe.parent)

    def final(self, probe: Probe) -> Trial:
        """A run of the probe's configuration from the start, as the file has it."""
        return self._trial(f"{FINAL}-{probe.name}", {k: v for k, v in described(probe).items() if "." in k})

    def _trial(self, name: str, overrides: dict[str, Any]) -> Trial:
        if name not in self.trials:
            (self.trials[name],) = make_trials(self.settings, [Point(overrides, overrides)], [name])
        return self.trials[name]

    def metric(self, probe: Probe) -> float | None:
        """As `walk` asks for it: a failed probe counts as ended only once this process has tried it."""
        trial = self.trial(probe)
        ended = outcome(self.out, trial)
        if ended is None or (ended.status == "failed" and probe.name not in self.tried):
            raise KeyError(probe.name)
        figure = line_of(self.out, trial, self.sweep).get("metric")
        return None if figure is None else float(figure)

    def walk(self) -> Walk:
        """The search as far as the directories tell it."""
        return walk(self.search, self.sweep.mode, self.metric, self.reserve)

    def _write(self, books: Books) -> Walk:
        """Brings the books and search.jsonl up to date with the directories."""
        at = self.walk()
        trials = [self.trial(probe) for probe in at.probes]
        done = at.ended is not None and self.search.final
        books.know([*trials, self.final(at.kept)] if done else trials)
        lines = [decision(number, step, self.metric) for number, step in enumerate(at.steps, 1)]
        if at.ended:
            final = books.lines.get(f"{FINAL}-{at.kept.name}", {})
            rounds = at.rounds + (self.reserve if final.get("status") == "done" else 0)
            lines.append(
                {"kept": at.kept.name, **{k: v for k, v in described(at.kept).items() if "." in k}, "ended": at.ended}
                | {"rounds": rounds, "client_rounds": rounds * self.cohort, "final": final.get("metric")}
            )
        atomic_write(self.out / "search.jsonl", "".join(f"{to_line(line)}\n" for line in lines))
        return at

    def table(self, trials: Sequence[Trial], lines: Sequence[Line], sweep: Sweep) -> Table:
        """A row a probe, in the order of the steps, and the final run; MB are those of the row's own rounds."""
        at = self.walk()
        report = reported(sweep, self.source)
        shown = [("metric", sweep.metric), *([("report", report)] if report else [])]
        total = {line["trial"]: line.get("bytes") or 0 for line in lines}
        steps = {probe.name: str(n) for n, step in enumerate(at.steps, 1) for probe in step.probes}
        kept = {at.first.name, *(step.winner.name for step in at.steps if step.winner)}
        rows = []
        for trial, line in zip(trials, lines, strict=True):
            lora, wire, rounds = trial.experiment.lora, trial.experiment.wire, trial.experiment.server.rounds
            final = trial.name.startswith(FINAL)
            own = rounds if final else self.search.rounds
            size = (total[trial.name] - total.get(trial.continues or "", 0)) / 1e6 / own
            state = "kept" if trial.name in kept else ""
            rows.append(
                (
                    "" if final else steps.get(trial.name, _number(at)),
                    FINAL if final else trial.name.rpartition("-")[2],
                    str(lora.rank), f"{wire.down.density:.4g}", f"{wire.up.density:.4g}", str(rounds),
                    *(spread(line.get(figure), None, key) for figure, key in shown),
                    f"{size:.3f}" if total[trial.name] else "-",
                    state if line["status"] == "done" else line["status"],
                )
            )  # fmt: skip
        names = ("step", "probe", "rank", "down", "up", "rounds", *(key for _, key in shown), "MB a round", "")
        return Table(f"FLASC-Search: {_verdict(at)}", names, tuple(rows))


def _number(at: Walk) -> str:
    """Of the step under way; 0 is the first probe."""
    return "0" if at.first in at.now or not at.now else str(len(at.steps) + 1)


def _verdict(at: Walk) -> str:
    kept = at.kept
    return f"kept rank {kept.rank}, densities {kept.down:.4g} down and {kept.up:.4g} up"
