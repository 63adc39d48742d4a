"""A sweep from its file to its table: every check first, then the trials that have not ended, then what came out.

The sweep's directory holds `sweep.yaml` (as it ran), `trials/NAME/` (each an ordinary run directory) with
`trials/NAME.json` (how it ended), `sweep.jsonl` (a line a trial) and `table.txt`. A sweep may be killed at any moment:
`resume` repeats no finished trial, continues the others from their own checkpoints, and tries failed ones again. The
file may have gained or lost trials since; it may not have changed those that are there.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfed.config.load import dump_settings
from rayfed.config.sweep import Sweep, load_sweep
from rayfed.engine.run import slug
from rayfed.errors import RunError, UserError
from rayfed.files import atomic_write
from rayfed.sweeps.plan import Trial, plan
from rayfed.sweeps.table import NOT_CHOSEN, UNFINISHED, Line, choosing, chosen, line_of, spread, table_of
from rayfed.sweeps.trial import locked, outcome, record_of
from rayfed.tasks.federation import Federation
from rayfed.tracking import Table
from rayfed.tracking.console import PlainView
from rayfed.tracking.jsonl import to_line


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its directory, a line a trial (as in sweep.jsonl), the table."""

    out: Path
    lines: list[Line]
    table: Table

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line["status"] not in ("done", NOT_CHOSEN)]


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
    trials, federations = plan(settings, sweep)
    ended = {trial.name: outcome(out, trial) for trial in trials}
    with locked(out, f"--out: {out} is in use by another sweep", wait=False):
        atomic_write(out / "sweep.yaml", dump_settings({**settings, "sweep": sweep.model_dump(mode="json")}))
        todo = []
        for trial in trials:
            done = ended[trial.name]
            if done is None or done.status == "failed":
                record_of(out, trial).unlink(missing_ok=True)
                todo.append(trial)
        console = (settings.get("tracking") or {}).get("console") != "off"
        books = Books(out, trials, sweep, PlainView(sys.stdout if console else io.StringIO()))
        first = choosing(trials, sweep)
        now = [trial for trial in todo if trial in first]
        later = f"; {len(trials) - len(first)} wait for what they choose" if len(first) < len(trials) else ""
        books.say(f"sweep {out}: {len(first)} trials, {len(now)} to run{later}")
        _run(now, sweep, out, federations, books)
        if later:
            best = books.choose()
            now = [trial for trial in todo if trial in best and trial not in first]
            books.say(f"chosen: {len(best)} trials of {len(trials)}, {len(now)} to run")
            _run(now, sweep, out, federations, books)
        table = books.write()
        books.view.table(table)
    return SweepResult(out, list(books.lines.values()), table)


def _run(trials: Sequence[Trial], sweep: Sweep, out: Path, federations: Mapping[str, Federation], books: Books) -> None:
    if trials:
        from rayfed.sweeps.on_tune import run_on_tune

        run_on_tune(trials, sweep, out, federations, books)


class Books:
    """Keeps sweep.jsonl and table.txt true to what the trials' directories say, and says what happened."""

    def __init__(self, out: Path, trials: Sequence[Trial], sweep: Sweep, view: PlainView) -> None:
        self.out, self.sweep, self.view = out, sweep, view
        self.trials = {trial.name: trial for trial in trials}
        self.lines: dict[str, Line] = {name: line_of(out, trial, sweep) for name, trial in self.trials.items()}
        self.write()

    def settled(self, name: str) -> None:
        """The trial has ended: its line is read anew, and told."""
        line = self.lines[name] = line_of(self.out, self.trials[name], self.sweep)
        self.write()
        ended = sum(line["status"] != UNFINISHED for line in self.lines.values())
        told = line["error"] or _told(line, self.sweep)
        self.say(f"[{ended}/{len(self.lines)}] {line['status']} {name}: {told}")

    def choose(self) -> list[Trial]:
        """The trials whose tuned values won; what has not run of the others is marked: it need not."""
        best = chosen(list(self.trials.values()), self.lines, self.sweep)
        for name in self.lines.keys() - {trial.name for trial in best}:
            if self.lines[name]["status"] == UNFINISHED:
                self.lines[name] = self.lines[name] | {"status": NOT_CHOSEN}
        self.write()
        return best

    def say(self, text: str) -> None:
        """Tells what happened."""
        self.view.note(text)

    def write(self) -> Table:
        """Writes both files and returns the table."""
        lines = list(self.lines.values())
        atomic_write(self.out / "sweep.jsonl", "".join(f"{to_line(line)}\n" for line in lines))
        table = table_of(list(self.trials.values()), lines, self.sweep)
        page = io.StringIO()
        PlainView(page).table(table)
        atomic_write(self.out / "table.txt", page.getvalue().lstrip("\n"))
        return table


def _told(line: Mapping[str, Any], sweep: Sweep) -> str:
    size, seconds = line.get("bytes") or 0, line.get("seconds") or 0
    return f"{sweep.metric} {spread(line.get('metric'), None, sweep.metric)}, {size / 1e6:.2f} MB, {seconds:.1f} s"


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
