"""A sweep from its file to its table: first every check, then the trials that have not ended, then the results.

The sweep's directory holds `sweep.yaml` (the file with all overrides), `trials/NAME/` (each an ordinary run directory)
with `trials/NAME.json` (its outcome), `sweep.jsonl` (one line a trial) and `table.txt`. A search adds `search.jsonl`
with its decisions. A sweep may be killed at any moment: `resume` repeats no finished trial, continues the others from
their own checkpoints, and runs failed trials again. The file may have gained or lost trials in between. It may not have
changed a trial that has a directory.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayfed.config.parse import dump_settings
from rayfed.config.sweep import Sweep, load_sweep
from rayfed.errors import RunError
from rayfed.files import PARTIAL, atomic_write, remove_path
from rayfed.run_directory import check_out, disk_errors, locked_out
from rayfed.sweeps.flasc import FlascSearch
from rayfed.sweeps.log import SweepLog
from rayfed.sweeps.optuna_search import OptunaSearch
from rayfed.sweeps.pbt import PbtSearch
from rayfed.sweeps.plan import Trial, plan_trials
from rayfed.sweeps.stages import StagedSearch, run_trials, trials_to_run
from rayfed.sweeps.table import NOT_SELECTED, STOPPED, TrialRow, make_table, selection_trials
from rayfed.sweeps.trial import read_outcome
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Table
from rayfed.tracking.console import PlainView

SEARCHES: dict[str, type[StagedSearch]] = {"flasc": FlascSearch, "optuna": OptunaSearch, "pbt": PbtSearch}


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its directory, the rows of sweep.jsonl, the table."""

    out: Path
    rows: list[TrialRow]
    table: Table

    @property
    def failed(self) -> list[TrialRow]:
        """The rows of trials that should have finished, but did not."""
        return [row for row in self.rows if row["status"] not in ("done", NOT_SELECTED, STOPPED)]


def run_sweep(
    path: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None, resume: bool = False,
    on_trial_end: Callable[[Trial], object] | None = None,
) -> SweepResult:  # fmt: skip
    """Runs the sweep in the file at ``path`` to its end. A failed trial is recorded, and the others continue.

    ``out`` (default `runs/NAME-TIME`) must be empty or absent unless ``resume``. ``on_trial_end`` is called with every
    trial that has ended, after its outcome is written. Raises UserError, before anything is started or written, where a
    trial is wrong or another process runs the sweep.
    """
    settings, sweep = load_sweep(path, overrides)
    with locked_out(out, str(settings.get("name", "sweep")), resume) as folder:
        out = folder.resolve()
        check_out(out, resume, "sweep", "sweep.yaml")
        search = SEARCHES[sweep.search.kind](settings, sweep, out) if sweep.search else None
        trials, federations = ([], {}) if search else plan_trials(settings, sweep)
        for trial in trials:
            read_outcome(out, trial)  # UserError if the trial was made with other settings
        with disk_errors(out):
            for leftover in (*out.glob(PARTIAL), *out.glob(f"trials/{PARTIAL}")):  # a trial's own run removes the rest
                remove_path(leftover)
            atomic_write(out / "sweep.yaml", dump_settings({**settings, "sweep": sweep.model_dump(mode="json")}))
            console = (settings.get("tracking") or {}).get("console") != "off"
            view = PlainView(sys.stdout if console else io.StringIO())
            table_of = search.table if search else lambda trials, rows: make_table(trials, rows, sweep)
            log = SweepLog(out, sweep, view, table_of, on_trial_end)
            if search:
                search.run(log)
            else:
                _run_list(trials, sweep, out, federations, log)
            table = log.write()
            view.table(table)
    return SweepResult(out, list(log.rows.values()), table)


def _run_list(
    trials: Sequence[Trial], sweep: Sweep, out: Path, federations: Mapping[str, Federation], log: SweepLog
) -> None:
    """Runs the trials of a sweep without a search. With `tune_seeds`, the trials of the first seeds run first."""
    first = selection_trials(trials, sweep)
    missing = trials_to_run(out, trials)
    now = [trial for trial in missing if trial in first]
    later = f"; {len(trials) - len(first)} wait for the selection" if len(first) < len(trials) else ""
    log.set_trials(trials)
    log.event(f"sweep {out}: {len(first)} trials, {len(now)} to run{later}")
    run_trials(now, sweep, out, federations, log)
    if later:
        selected = log.select()
        now = [trial for trial in missing if trial in selected and trial not in first]
        log.event(f"selected: {len(selected)} trials of {len(trials)}, {len(now)} to run")
        # Without `stop`: a mean over only those seeds that were not stopped would be too good.
        run_trials(now, sweep.model_copy(update={"stop": None}), out, federations, log)


def check_failed(result: SweepResult) -> None:
    """RunError if a trial did not finish: then the command's exit code is 1."""
    if result.failed:
        raise RunError(
            f"{len(result.failed)} of {len(result.rows)} trials did not finish; --resume tries them again "
            f"({result.out / 'sweep.jsonl'} says why)"
        )
