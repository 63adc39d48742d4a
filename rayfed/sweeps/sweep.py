"""A sweep from its file to its table: first every check, then the trials that have not ended, then the results.

The sweep's directory holds `sweep.yaml` (the file with all overrides), `trials/NAME/` (each an ordinary run directory),
`sweep.jsonl` (one line a trial) and `table.txt`. A search adds `search.jsonl` with its decisions. A sweep may be killed
at any moment: `resume` repeats no finished trial, continues the others from their own checkpoints, and runs failed
trials again. The file may have gained or lost trials in between. It may not have changed a trial that has a directory.

A `Search` chooses the trials that Ray Tune runs: the list of all points, or a search of its own module. It knows how
earlier trials ended by their run directories: a run with a summary.json is done, and needs no further record. Only that
a trial was stopped early is read from sweep.jsonl. What a search decides next may depend on the order in which trials
ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rayfed.config.parse import dump_settings
from rayfed.config.sweep import SEED, Sweep, load_sweep
from rayfed.errors import allowed
from rayfed.files import PARTIAL, atomic_write, remove_path
from rayfed.plugins import load_object
from rayfed.run_directory import check_out, disk_errors, locked_out
from rayfed.sweeps import plan
from rayfed.sweeps.plan import Config, Point, Trial, expand
from rayfed.sweeps.table import TrialRow, make_table, of_first_seeds, selected, trial_row
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Table, read_metrics
from rayfed.tracking.console import plain_text
from rayfed.tracking.jsonl import read_lines, write_lines
from rayfed.tracking.trials import TrialsView, open_trials

SWEEP_FILE, SEARCH_FILE = "sweep.jsonl", "search.jsonl"
SEARCHES = {"flasc": "flasc_search:FlascProbes", "optuna": "optuna_search:OptunaPoints", "pbt": "pbt:Population"}


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its directory, the rows of sweep.jsonl, the table."""

    out: Path
    rows: list[TrialRow]
    table: Table

    @property
    def failed(self) -> list[TrialRow]:
        """The rows of trials that should have finished, but did not."""
        return [row for row in self.rows if row["status"] not in ("done", plan.NOT_SELECTED, plan.STOPPED)]


def run_sweep(
    path: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None, resume: bool = False,
    on_trial_end: Callable[[Trial], object] | None = None,
) -> SweepResult:  # fmt: skip
    """Runs the sweep in the file at ``path`` to its end. A failed trial is recorded, and the others continue.

    ``out`` (default `runs/NAME-TIME`) must be empty or absent unless ``resume``. ``on_trial_end`` is called with every
    trial that has ended, after its row is written. Raises UserError, before anything is started or written, where a
    trial is wrong or another process runs the sweep.
    """
    settings, sweep = load_sweep(path, overrides)
    with locked_out(out, str(settings.get("name", "sweep")), resume) as folder:
        out = folder.resolve()
        check_out(out, resume, "sweep", "sweep.yaml")
        search = build_search(settings, sweep, out)
        mode = str((settings.get("tracking") or {}).get("console", "auto"))
        with disk_errors(out), open_trials(mode, sweep.metric) as console:
            for leftover in (*out.glob(PARTIAL), *out.glob(f"trials/{PARTIAL}")):  # a trial's own run removes the rest
                remove_path(leftover)
            atomic_write(out / "sweep.yaml", dump_settings({**settings, "sweep": sweep.model_dump(mode="json")}))
            search.console = console
            search.on_trial_end = on_trial_end or search.on_trial_end
            search.run()
            console.result = table = search.table()
    return SweepResult(out, list(search.rows.values()), table)


class Search:
    """The trials of the sweep in the directory ``out``. ``settings``: what all trials share.

    A derived class calls `check` in `__init__`, and refuses there what else is wrong: before anything starts.
    """

    pauses = False
    """Whether Tune pauses trials, or copies them: then it needs their checkpoints."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        self.settings, self.sweep, self.out = settings, sweep, out
        self.checked: list[Trial] = []
        """Trials that ask Ray for as much as any later trial."""
        self.federations: dict[str, Federation] = {}
        """The data of the trials, by `data_key`."""
        self.trials: dict[str, Trial] = {}
        """The trials so far, by name, in order."""
        self.rows: dict[str, TrialRow] = {}
        """Their rows of sweep.jsonl, by name."""
        self.waiting: list[Trial] = []
        """The trials that Tune gets next, in order."""
        self.console: TrialsView
        """The console; set before the search runs."""
        self.on_trial_end: Callable[[Trial], object] = lambda trial: None
        """Called with every trial that has ended, after its row is written."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles searchers and callbacks, and no sweep reads that file. They hold data."""
        return {}

    def check(self, points: Iterable[Point]) -> None:
        """Sets `checked` and `federations`. UserError where one of the points is wrong."""
        self.checked = plan.make_trials(self.settings, points)
        self.federations = plan.check_trials(self.checked, self.sweep)

    def complete(self) -> bool:
        """Whether all trials have ended, and no further one follows."""
        return not self.missing(self.trials.values())

    def tune_config(self) -> dict[str, Any]:
        """Arguments of `tune.TuneConfig`, and `param_space`, in addition to those of every sweep."""
        return {}

    def suggest(self) -> Config | None:
        """Tune's config of the next trial; None while others have to end first, and after the last one."""
        if not self.waiting:
            return None
        trial = self.waiting.pop(0)
        return {plan.NAME: trial.name, **trial.overrides}

    def tell(self, trial: Trial) -> None:
        """Takes note of the results of a trial that has ended. The row of the trial has them."""

    def lines(self) -> Sequence[Mapping[str, Any]]:
        """The lines of search.jsonl; none: there is no such file."""
        return ()

    def title(self) -> str | None:
        """The title of the table; None: it says how values are chosen."""
        return None

    def labels(self, trial: Trial) -> Mapping[str, Any]:
        """The first cells of the trial's line in the table, by column."""
        return trial.labels

    def marks(self) -> Mapping[str, str] | None:
        """The last cells of lines in the table, by the name of the first trial of the line; None: no such column."""
        return None

    def table(self) -> Table:
        """The table of the sweep."""
        trials = [replace(own, labels=self.labels(own)) for own in self.trials.values()]
        return make_table(trials, self.rows, self.sweep, self.title(), self.marks())

    def run(self) -> None:
        """Runs the missing trials on Ray Tune. Without any, Ray Tune is not even imported."""
        self.write()
        if not self.complete():
            from rayfed.sweeps.on_tune import run_on_tune

            run_on_tune(self)
            self.write()

    def trial(self, name: str, settings: Mapping[str, Any]) -> Trial:
        """The trial of that name, added if it is new. UserError where its settings are wrong.

        PBT changes the settings of a trial; its run directory has them once its process works.
        """
        known = self.trials.get(name)
        if known is None or known.overrides != settings:
            (self.trials[name],) = plan.make_trials(self.settings, [Point(settings, settings, name)])
        if known is None:
            self.add(self.trials[name])
        return self.trials[name]

    def add(self, trial: Trial, error: str | None = None, stopped: int | None = None) -> None:
        """Adds the trial and makes its row, see `trial_row`. UserError if its run directory has other settings."""
        self.rows[trial.name] = trial_row(self.out, trial, self.sweep, error, stopped)
        self.trials[trial.name] = trial

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """The trials that have not ended, and those that failed."""
        return [trial for trial in trials if self.rows[trial.name]["status"] in (plan.UNFINISHED, plan.FAILED)]

    def trial_ended(self, trial: Trial, error: str | None = None, round: int | None = None) -> None:
        """Writes the row of the trial and shows it. It has failed for the reason ``error``, or ended after ``round``.

        It is done if its run has written a summary; else the scheduler has stopped it.
        """
        self.add(trial, error, round)
        self.tell(trial)
        self.write()
        self.console.end(self.rows[trial.name], self.ended, len(self.rows))
        self.on_trial_end(trial)

    @property
    def ended(self) -> int:
        """How many trials have ended."""
        return sum(row["status"] != plan.UNFINISHED for row in self.rows.values())

    def write(self) -> None:
        """Writes sweep.jsonl, search.jsonl and table.txt."""
        write_lines(self.out / SWEEP_FILE, self.rows.values())
        if lines := self.lines():
            write_lines(self.out / SEARCH_FILE, lines)
        atomic_write(self.out / "table.txt", plain_text(self.table()))


class TrialList(Search):
    """A sweep without a search: every point of the spaces is a trial, and all are known before the first one starts.

    With `tune_seeds`, the trials of the first seeds run first. Of the others only those with the chosen values run.
    """

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        seed = settings.get(SEED, 0)
        self.check(expand(sweep, seed if isinstance(seed, int) else 0))
        stopped = {row["trial"]: row["stopped"]["round"] for row in read_lines(out / SWEEP_FILE) if row.get("stopped")}
        for trial in self.checked:
            self.add(trial, stopped=stopped.get(trial.name))
        self.now = of_first_seeds(self.checked, sweep)
        """The trials that Tune gets."""
        self.stop = sweep.stop

    def run(self) -> None:
        later = len(self.checked) - len(self.now)
        wait = f"; {later} wait for the selection" if later else ""
        self.console.note(f"sweep {self.out}: {len(self.now)} trials, {len(self.missing(self.now))} to run{wait}")
        super().run()
        if later:
            self.now = selected(self.checked, self.rows, self.sweep)
            for name in self.rows.keys() - {trial.name for trial in self.now}:
                if self.rows[name]["status"] == plan.UNFINISHED:
                    self.rows[name]["status"] = plan.NOT_SELECTED
            # Not with `stop`: a mean over only those seeds that were not stopped would be too good.
            self.stop, missing = None, len(self.missing(self.now))
            self.console.note(f"selected: {len(self.now)} trials of {len(self.checked)}, {missing} to run")
            super().run()

    def complete(self) -> bool:
        return not self.missing(self.now)

    def tune_config(self) -> dict[str, Any]:
        self.waiting, metric = self.missing(self.now), self.sweep.metric
        if self.stop is None:
            return {}
        from ray.tune.schedulers import ASHAScheduler

        rounds, stop = max(trial.experiment.server.rounds for trial in self.now), self.stop
        # Tune compares trials in the order of arrival. So which are stopped may depend on timing, unless
        # `sweep.concurrency` is 1. The results of a trial never do.
        scheduler: Any = ASHAScheduler(
            "round", metric, self.sweep.mode, rounds, stop.grace, stop.factor, stop.brackets, stop_last_trials=False
        )
        for trial in (own for own in self.now if not self.missing([own])):  # ASHA also compares with those that ended
            known, last = SimpleNamespace(trial_id=trial.name), self.rows[trial.name].get("stopped", {}).get("round")
            scheduler.on_trial_add(None, known)
            for record in read_metrics(plan.trial_folder(self.out, trial.name) / "metrics.jsonl"):
                if record.get(metric) is not None and record["round"] <= (last or rounds):
                    scheduler.on_trial_result(None, known, record)
        return {"scheduler": scheduler}


def build_search(settings: dict[str, Any], sweep: Sweep, out: Path) -> Search:
    """The trials or the search that the section describes. UserError, before anything starts, where it is wrong."""
    if sweep.search is None:
        return TrialList(settings, sweep, out)
    if sweep.search.kind == "optuna" and find_spec("optuna") is None:
        raise allowed("sweep.search.kind", "optuna", "it is not installed: pip install -e '.[optuna]'")
    search: Callable[..., Search] = load_object(f"rayfed.sweeps.{SEARCHES[sweep.search.kind]}", "sweep.search.kind")
    return search(settings, sweep, out)
