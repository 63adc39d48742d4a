"""`rayfed run` and `rayfed sweep`: into a folder, or to the URI of an object store.

With a URI, the command works in a folder under `runs/`. The folder is uploaded after every checkpoint of a run and
after every trial of a sweep, and once more when the command ends: done, failed or interrupted. The local folder is
removed when everything is done and uploaded. `--resume` downloads what is at the URI first, unless the local folder
still exists.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import rayfed
from rayfed.cli.reports import write_page
from rayfed.errors import UserError
from rayfed.storage import RemoteFolder, fetch, is_uri, masked
from rayfed.tracking import Record, RunInfo, Sink, Table


def run(config: str, overrides: Sequence[str], out: str | None, resume: bool) -> None:
    """Runs the experiment and prints its digest and its directory."""
    _check(out, resume, "run")
    experiment = rayfed.load_config(config, overrides)
    pack_open = " (engine.pack is not chosen yet)" if experiment.engine.pack == "auto" else ""
    print(f"settings {experiment.digest()}{pack_open}", flush=True)
    result = rayfed.run(experiment, out=out, resume=resume, sink=_PageSink())
    if out and is_uri(out):
        shutil.rmtree(result.out)
    print(f"run directory {masked(out) if out and is_uri(out) else result.out}")


def sweep(config: str, overrides: Sequence[str], out: str | None, resume: bool) -> None:
    """Runs the sweep and prints its directory. RunError where a trial did not finish."""
    from rayfed.sweeps.sweep import check_failed, run_sweep

    _check(out, resume, "sweep")
    if not out or not is_uri(out):
        result = run_sweep(config, overrides, out, resume)
        print(f"sweep directory {result.out}", flush=True)
        check_failed(result)
        return
    folder, remote = fetch(out, resume, "sweep.yaml"), RemoteFolder(out)
    try:
        result = run_sweep(config, overrides, folder, resume, on_trial_end=lambda _: remote.upload(folder))
    finally:
        remote.upload(folder)
    print(f"sweep directory {masked(out)}", flush=True)
    check_failed(result)  # its message names a file of the local folder
    shutil.rmtree(folder)


class _PageSink(Sink):
    """Writes `report.html` when the run has finished, before the run directory is uploaded for the last time."""

    def start(self, info: RunInfo) -> None:
        self.out = Path(info.out)

    def finish(self, summary: Record, table: Table | None) -> None:
        write_page(self.out)


def _check(out: str | None, resume: bool, what: str) -> None:
    if resume and not out:
        raise UserError(f"--resume: needs --out, the directory of the {what} to continue")
