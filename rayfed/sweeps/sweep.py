"""A sweep from its file to its table: first every check, then the trials that have not ended, then the results.

The sweep's directory holds `sweep.yaml` (the file with all overrides), `trials/NAME/` (each an ordinary run directory),
`sweep.jsonl` (one line a trial) and `table.txt`. A search adds `search.jsonl` with its decisions. A sweep may be killed
at any moment: `resume` repeats no finished trial, continues the others from their own checkpoints, and runs failed
trials again. The file may have gained or lost trials in between. It may not have changed a trial that has a directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayfed.config.parse import dump_settings
from rayfed.config.sweep import load_sweep
from rayfed.errors import RunError
from rayfed.files import PARTIAL, atomic_write, remove_path
from rayfed.run_directory import check_out, disk_errors, locked_out
from rayfed.sweeps.plan import NOT_SELECTED, STOPPED, Trial
from rayfed.sweeps.search import build_search
from rayfed.sweeps.table import TrialRow
from rayfed.tracking import Table
from rayfed.tracking.trials import open_trials


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


def check_failed(result: SweepResult) -> None:
    """RunError if a trial did not finish: then the command's exit code is 1."""
    if result.failed:
        raise RunError(
            f"{len(result.failed)} of {len(result.rows)} trials did not finish; --resume tries them again "
            f"({result.out / 'sweep.jsonl'} says why)"
        )
