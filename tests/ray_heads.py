"""Ray clusters of processes on this machine, started as people start them: a head that asks for a token, more nodes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import rayfed

TOKEN = "rayfed-test-token-0123456789"
WITH_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """Where a head listens."""

    url: str  # of the dashboard, which takes jobs
    gcs: str  # what nodes join
    folder: str


def environment(**more: str) -> dict[str, str]:
    """Of this process, without what names another cluster or token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or "USAGE" in name}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"  # `rayfed` is found there
    root = str(Path(rayfed.__file__).parents[1])
    return {**kept, "PATH": path, "PYTHONPATH": root, **more}


@contextmanager
def started_head() -> Iterator[Head]:
    """A head of 4 CPUs that asks for TOKEN; stopped with all its processes at the end."""
    folder = tempfile.mkdtemp(prefix="rf-", dir="/tmp")  # sockets in it need a short path
    gcs, dashboard, client, agent = free_ports(4)
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", folder)
    arguments = [
        "--head", "--num-cpus=4", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--temp-dir={folder}", f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    process = _start(arguments, folder)
    try:
        _wait(head, process, nodes=1)
        yield head
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joined(head: Head, cpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """One more node, a process group of its own; whoever kills it has lost the node."""
    # With a folder of its own, as on a machine of its own: a node deletes the working directories it has done with.
    folder = tempfile.mkdtemp(prefix="rf-", dir="/tmp")
    (agent,) = free_ports(1)
    arguments = [f"--address={head.gcs}", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}"]
    process = _start([*arguments, f"--temp-dir={folder}"], head.folder)
    try:
        _wait(head, process, nodes=2)
        yield process
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _start(arguments: list[str], home: str) -> subprocess.Popen[bytes]:
    command = [RAY, "start", "--block", *arguments, "--object-store-memory=100000000", "--disable-usage-stats"]
    return subprocess.Popen(
        command, env=environment(**WITH_TOKEN, HOME=home), start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _wait(head: Head, process: subprocess.Popen[bytes], nodes: int) -> None:
    secret, deadline = environment(**WITH_TOKEN, HOME=head.folder), time.monotonic() + 120
    while True:
        command = [RAY, "list", "nodes", "--address", head.url, "--filter", "state=ALIVE", "--format", "json"]
        shown = subprocess.run(command, env=secret, capture_output=True, text=True)
        if shown.returncode == 0 and shown.stdout.count('"node_id"') >= nodes:
            return
        assert process.poll() is None, "the node ended"
        assert time.monotonic() < deadline, f"no {nodes} nodes: {shown.stdout[-500:]} {shown.stderr[-500:]}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)  # `ray start --block` then ends what it started
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
