"""A sweep from its file to its table: every check first, then the trials that have not ended, then what came out.

The sweep's directory holds `sweep.yaml` (as it ran), `trials/NAME/` (each an ordinary run directory) with
`trials/NAME.json` (how it ended), `sweep.jsonl` (a line a trial) and `table.txt`; a search adds `search.jsonl`
(its decisions and, for optuna and pbt, the figures that they go by). A sweep may be killed at any moment: `resume`
repeats no finished trial, continues the others from their own checkpoints, and tries failed ones again. The file may
have gained or lost trials since; it may not have changed those that are there.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfed.api import slug
from rayfed.config.load import dump_settings
from rayfed.config.sweep import Sweep, load_sweep
from rayfed.errors import RunError, UserError
from rayfed.files import atomic_write
from rayfed.sweeps.flasc_search import FlascSearchRun
from rayfed.sweeps.log import SweepLog, run_trials, to_run
from rayfed.sweeps.optimize import OptunaSearch
from rayfed.sweeps.plan import Trial, plan_trials
from rayfed.sweeps.population import PopulationSearch
from rayfed.sweeps.stages import StagedSearch
from rayfed.sweeps.table import NOT_CHOSEN, STOPPED, TrialRow, choosing, table_of
from rayfed.sweeps.trial import locked, outcome
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Table
from rayfed.tracking.console import PlainView


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its directory, a line a trial (as in sweep.jsonl), the table."""

    out: Path
    lines: list[TrialRow]
    table: Table

    @property
    def failed(self) -> list[TrialRow]:
        return [line for line in self.lines if line["status"] not in ("done", NOT_CHOSEN, STOPPED)]


def run_sweep(
    path: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None, resume: bool = False
) -> SweepResult:
    """Runs the sweep in the file at ``path`` to its end; a failed trial is recorded and stops no other.

    ``out`` (default `runs/NAME-TIME`) must be empty or absent unless ``resume``. UserError before anything is started
    or written where something is wrong with any trial; RunError where another process has the sweep.
    """
    settings, sweep = load_sweep(path, overrides)
    name = slug(str(settings.get("name", "sweep")))
    out = (Path(out) if out is not None else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    _check_out(out, resume)
    search = _searcher(settings, sweep, out)
    trials, federations = ([], {}) if search else plan_trials(settings, sweep)
    for trial in trials:
        outcome(out, trial)  # made with these settings, or refused
    with locked(out, f"--out: {out} is in use by another sweep", wait=False):
        atomic_write(out / "sweep.yaml", dump_settings({**settings, "sweep": sweep.model_dump(mode="json")}))
        console = (settings.get("tracking") or {}).get("console") != "off"
        view = PlainView(sys.stdout if console else io.StringIO())
        books = SweepLog(out, trials, sweep, view, search.table if search else table_of)
        if search:
            search.run(books)
        else:
            _run_list(trials, sweep, out, federations, books)
        table = books.write()
        view.table(table)
    return SweepResult(out, list(books.lines.values()), table)


def _searcher(settings: dict[str, Any], sweep: Sweep, out: Path) -> StagedSearch | None:
    """What decides by itself what runs, all checked; None where the sweep is a list."""
    if sweep.search is None:
        return None
    searchers: dict[str, type[StagedSearch]] = {
        "flasc": FlascSearchRun,
        "optuna": OptunaSearch,
        "pbt": PopulationSearch,
    }
    return searchers[sweep.search.kind](settings, sweep, out)


def _run_list(
    trials: Sequence[Trial], sweep: Sweep, out: Path, federations: Mapping[str, Federation], books: SweepLog
) -> None:
    """The trials of a fixed list: all of them, or in two steps where the first seeds choose what the others run."""
    first = choosing(trials, sweep)
    todo = to_run(out, trials)
    now = [trial for trial in todo if trial in first]
    later = f"; {len(trials) - len(first)} wait for what they choose" if len(first) < len(trials) else ""
    books.know(trials)
    books.say(f"sweep {out}: {len(first)} trials, {len(now)} to run{later}")
    run_trials(now, sweep, out, federations, books)
    if later:
        best = books.choose()
        now = [trial for trial in todo if trial in best and trial not in first]
        books.say(f"chosen: {len(best)} trials of {len(trials)}, {len(now)} to run")
        # What was chosen runs to its end: a mean over the seeds that were not stopped would flatter it.
        run_trials(now, sweep.model_copy(update={"stop": None}), out, federations, books)


def _check_out(out: Path, resume: bool) -> None:
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"--out: got {str(out)!r}, but {place} is a file")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not resume:
        raise UserError(f"--out: got {str(out)!r}, but it is not empty; continue it with --resume or name another")
    if not (out / "sweep.yaml").is_file():
        raise UserError(f"--resume: got {str(out)!r}, but that is no sweep's directory: it has no sweep.yaml")


def check_failed(result: SweepResult) -> None:
    """RunError where some trial did not finish: the command's exit code says so."""
    if result.failed:
        raise RunError(
            f"{len(result.failed)} of {len(result.lines)} trials did not finish; --resume tries them again "
            f"({result.out / 'sweep.jsonl'} says why)"
        )
