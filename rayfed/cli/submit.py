"""`rayfed submit`: the same command as on this machine, as a job on a Ray cluster.

A thin wrapper over `ray.job_submission.JobSubmissionClient`. The config file and the paths of `--include` are sent,
never the folder around them: rayfed is installed on the cluster, and data lie there. All checks that need no data run
here, before the cluster is asked. Ray reads the token of a cluster with token authentication where `ray job submit`
reads it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from rayfed import __version__, load_config
from rayfed.config.load import read_settings
from rayfed.config.shipped import find_config
from rayfed.config.sweep import load_sweep
from rayfed.errors import RunError, UserError, allowed, first_line
from rayfed.storage import is_uri, masked, refuse_credentials, slug

SENT_AT_MOST = 10_000_000  # bytes; a larger job sends data, which belong on the cluster
LEFT_OUT = {".git", ".venv", "venv", "__pycache__"}
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to the argument


@dataclass(frozen=True)
class Job:
    """A command for the cluster and the files that it needs: path in the job's folder -> path on this machine."""

    id: str
    entrypoint: str
    out: str
    files: dict[Path, Path]
    metadata: dict[str, str]


def submit(
    config: str, overrides: Sequence[str], address: str | None, out: str | None, resume: bool, include: Sequence[str],
    follow: bool,
) -> None:  # fmt: skip
    """Submits the job, prints its name and the commands that follow and stop it, and follows it if ``follow``."""
    address = _address(address)
    job = plan(config, overrides, out, resume, include)
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="rayfed-submit-") as folder:
        for name, source in job.files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        with _refusals(address):
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.id,
                runtime_env={"working_dir": folder},
                metadata=job.metadata,
            )
    print(f"job {job.id}\nout {masked(job.out) if is_uri(job.out) else f'{job.out} on the head'}")
    for command in ("status", "logs --follow", "stop"):
        print(f"  ray job {command} --address {shlex.quote(address)} {job.id}")
    if follow:
        _follow(client, job.id)


def plan(
    config: str, overrides: Sequence[str] = (), out: str | None = None, resume: bool = False,
    include: Sequence[str] = (),
) -> Job:  # fmt: skip
    """The job for this config. UserError where settings, paths or the size of the files to send are wrong."""
    config = str(find_config(config))
    command, name, digest, places = _settings(config, overrides)
    files = _files(config, include)
    sent = {path.parts[:1] for path in files}
    for field, place in places.items():
        if place and not place.startswith(("/", "~")) and Path(place).parts[:1] not in sent:
            what = "a job runs in a folder of its own on the cluster; give an absolute path there, or send it with "
            raise allowed(field, place, what + "--include if it is small")
    job_id = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    for override in overrides:
        refuse_credentials(override, "override")
    out = f"~/runs/{job_id}" if out is None else out
    if is_uri(out):
        refuse_credentials(out)
    elif not out.startswith(("/", "~/")):
        what = "a job's own folder goes with the job; give a path on the cluster's head that starts with / or ~/"
        raise allowed("--out", out, what)
    # The cluster's shell puts in its own home folder.
    folder = '"$HOME"/' + shlex.quote(out[2:]) if out.startswith("~/") else shlex.quote(out)
    words = shlex.join(["rayfed", command, Path(config).name, *overrides])
    entrypoint = f"{words} --out {folder}{' --resume' if resume else ''}"
    return Job(job_id, entrypoint, out, files, {"config": Path(config).name, "digest": digest, "rayfed": __version__})


def _settings(config: str, overrides: Sequence[str]) -> tuple[str, str, str, dict[str, str | None]]:
    """(command, name, digest, the settings that may name local paths), after every check that needs no data."""
    if "sweep" in read_settings(config) or any(override.startswith("sweep.") for override in overrides):
        settings, _ = load_sweep(config, overrides)  # the cluster checks its trials: the data are there
        command, name, digest = "sweep", str(settings.get("name", "sweep")), ""
        data, model = settings.get("data") or {}, settings.get("model") or {}
        path, base, adapter = data.get("path"), model.get("name"), model.get("adapter")
    else:
        experiment = load_config(config, overrides)
        command, name, digest = "run", experiment.name, experiment.digest()
        path, base, adapter = experiment.data.path, experiment.model.name, experiment.model.adapter
    local_base = base if base and Path(base).is_dir() else None  # else a model of a hub
    return command, slug(name), digest, {"data.path": path, "model.name": local_base, "model.adapter": adapter}


def _files(config: str, include: Sequence[str]) -> dict[Path, Path]:
    """The files to send: path in the job's folder -> path here. UserError where one is missing or all are too large."""
    found: dict[Path, Path] = {Path(Path(config).name): Path(config)}
    for given in include:
        root = Path(given).expanduser().resolve()
        if not root.exists():
            raise allowed("--include", given, "there is no such file or folder")
        for path in (root, *root.rglob("*")):
            if path.is_file() and not LEFT_OUT & {*path.relative_to(root).parts}:
                found[path.relative_to(root.parent)] = path
    sizes = {path: path.stat().st_size for path in found.values()}
    if sum(sizes.values()) > SENT_AT_MOST:
        largest = max(sizes, key=lambda path: sizes[path])
        total, alone, most = (size / 1e6 for size in (sum(sizes.values()), sizes[largest], SENT_AT_MOST))
        raise UserError(
            f"--include: {total:.1f} MB would be sent ({largest} alone {alone:.1f}), but a job takes "
            f"at most {most:.0f} MB; put data on the cluster and set data.path to their path there"
        )
    return found


def _address(given: str | None) -> str:
    address = given or os.environ.get(ADDRESSES[0], "")
    if not address.startswith(("http://", "https://")):
        raise allowed("--address", address, "allowed is the URL of a dashboard, such as http://localhost:8265")
    return address.rstrip("/")


def _connect(address: str) -> Any:
    overruling = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        with _refusals(address):
            return JobSubmissionClient(address)
    finally:
        os.environ.update(overruling)


@contextmanager
def _refusals(address: str) -> Iterator[None]:
    """Turns errors of the connection to the cluster into one line each."""
    try:
        yield
    except AuthenticationError:
        if os.environ.get("RAY_AUTH_MODE") == "token":
            why = "does not take this machine's token; it should be the cluster's own, in"
        else:
            why = "asks for a token: set RAY_AUTH_MODE=token, with the cluster's token in"
        raise UserError(f"--address: {address} {why} ~/.ray/auth_token or RAY_AUTH_TOKEN") from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise allowed("--address", address, f"no Ray cluster takes a job there ({first_line(error)})") from None


def _follow(client: Any, job_id: str) -> None:
    """Prints the job's logs until it ends. RunError where the job did not succeed, or can no longer be followed."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)

    try:
        asyncio.run(tail())
        while not (status := client.get_job_status(job_id)).is_terminal():
            time.sleep(0.5)
    except KeyboardInterrupt:
        raise RunError(f"no longer following {job_id}; the job goes on") from None
    except (OSError, RuntimeError) as error:
        state = "`ray job status` shows its state"
        raise RunError(f"cannot follow {job_id} any longer ({first_line(error)}); {state}") from None
    if status != "SUCCEEDED":
        last = (client.get_job_info(job_id).message or "no reason given").strip().splitlines()[-1]
        raise RunError(f"job {job_id} ended as {status}: {last}")
