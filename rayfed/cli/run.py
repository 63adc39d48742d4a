"""`rayfed run` and `rayfed sweep`: into a folder, or to the URI of an object store.

With a URI, the command works in a folder under `runs/`. The folder is uploaded after every checkpoint of a run and
after every trial of a sweep, and once more when the command ends: done, failed or interrupted. The local folder is
removed when everything is done and uploaded. `--resume` downloads what is at the URI first, unless the local folder
still exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import rayfed
from rayfed.cli.doctor import doctor
from rayfed.errors import RunError
from rayfed.files import remove_path
from rayfed.run_directory import locked_out
from rayfed.storage import RemoteFolder, fetch, is_uri, local_folder, masked, refuse_credentials, uploaded

if TYPE_CHECKING:
    from rayfed.sweeps.sweep import SweepResult


def run(config: str, overrides: Sequence[str], out: str | None, resume: bool, dry_run: bool = False) -> None:
    """Runs the experiment and prints its digest and its directory. With ``dry_run``, says what it would do instead."""
    if dry_run:
        doctor(config, overrides)
        return
    experiment = rayfed.load_config(config, overrides)
    pack_open = " (engine.pack is not chosen yet)" if experiment.engine.pack == "auto" else ""
    print(f"settings {experiment.digest()}{pack_open}", flush=True)
    if not is_uri(out):
        result = rayfed.run(experiment, out=out, resume=resume, callbacks=[rayfed.ReportCallback()])
        print(f"run directory {result.out}")
        return
    with _local_folder(out, resume) as folder:
        rayfed.run(experiment, out=out, resume=resume, callbacks=[rayfed.ReportCallback()])
        remove_path(folder)
    print(f"run directory {masked(out)}")


def sweep(config: str, overrides: Sequence[str], out: str | None, resume: bool) -> None:
    """Runs the sweep, writes its page and prints its directory. RunError where a trial did not finish."""
    from rayfed.reports.sweep_page import write_sweep_page
    from rayfed.sweeps.sweep import run_sweep

    if not is_uri(out):
        result = run_sweep(config, overrides, out, resume)
        write_sweep_page(result.out)
        print(f"sweep directory {result.out}", flush=True)
        _check_failed(result)
        return
    with _local_folder(out, resume) as folder:
        remote = RemoteFolder(out)
        fetch(remote, folder, resume, "sweep.yaml")
        with uploaded(remote, folder, "sweep.yaml"):
            result = run_sweep(config, overrides, folder, resume, on_trial_end=lambda _: remote.upload(folder))
            write_sweep_page(folder)
        print(f"sweep directory {masked(out)}", flush=True)
        _check_failed(result)  # its message names a file of the local folder
        remove_path(folder)


def _check_failed(result: SweepResult) -> None:
    """RunError if a trial did not finish: then the exit code is 1."""
    if result.failed:
        why = f"--resume tries them again ({result.out / 'sweep.jsonl'} says why)"
        raise RunError(f"{len(result.failed)} of {len(result.rows)} trials did not finish; {why}")


@contextmanager
def _local_folder(uri: str, resume: bool) -> Iterator[Path]:
    """The local folder for the URI, locked until everything is uploaded and it is removed."""
    refuse_credentials(uri)
    with locked_out(local_folder(uri), "", resume) as folder:
        yield folder
