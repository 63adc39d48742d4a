"""Ray that does not start or cannot be joined: one line, soon."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray

from rayfed.engine import connect
from rayfed.engine.connect import start_ray
from rayfed.errors import RunError, UserError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket of this machine that listens, and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        yield server


def address_of(server: socket.socket) -> str:
    return ":".join(map(str, server.getsockname()))


@pytest.fixture
def init(monkeypatch) -> list[object]:
    """Stands for `ray.init`: raises each of the errors in the list, one a call, and then returns."""
    errors: list[object] = []
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the tests of other files have a Ray in this process
    monkeypatch.setattr(ray, "init", lambda **_: raise_(errors.pop(0)) if errors else SimpleNamespace(dashboard_url=""))
    return errors


def raise_(error):
    raise error


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens(init, listener, scheme):
    address = scheme + address_of(listener)
    listener.close()
    with pytest.raises(UserError) as refusal:
        start_ray(address, 1)
    assert str(refusal.value) == (
        f"engine.address: got {address!r}, but no Ray cluster can be reached there ([Errno 111] Connection refused)"
    )


def test_a_host_that_does_not_answer(init, listener, monkeypatch):
    monkeypatch.setattr(connect, "ANSWER", 0.2)
    monkeypatch.setenv("RAY_ADDRESS", address_of(listener))
    refused = pytest.raises(UserError, match=r"^RAY_ADDRESS: got .*, but no Ray cluster can be reached there \(no ans")
    with socket.create_connection(listener.getsockname()), refused:  # the queue is full: more connections wait for ever
        start_ray(None, 1)


def test_what_ray_says_about_a_cluster_is_one_line(init, listener):
    init.append(RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n    Python: 3.9.1\n"))
    with pytest.raises(UserError) as refusal:
        start_ray(address_of(listener), 1)
    assert str(refusal.value).endswith(
        "but Ray cannot join it: Version mismatch: The cluster was started with: Ray: 2.1.0 Python: 3.9.1"
    )


def test_ray_is_started_again_on_a_busy_machine(init, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    slow = Exception("The current node timed out during startup. This could happen because ...")
    init.extend([slow, slow])
    start_ray(None, 1)
    assert init == []
    init.extend([slow] * 3)
    with pytest.raises(RunError, match=r"^Ray did not start on this machine, tried 3 times: The current node .*/logs$"):
        start_ray(None, 1)


def test_a_dashboard_is_started_here_and_its_address_is_that_of_the_cluster(listener, monkeypatch):
    asked, events = [], []

    def init(**given):
        asked.append((given["address"], given["include_dashboard"]))
        return SimpleNamespace(dashboard_url="127.0.0.1:8265" if given["include_dashboard"] else "")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray(None, 1, event=events.append)
    start_ray(None, 1, dashboard=True, event=events.append)
    start_ray(address_of(listener), 1, dashboard=True, event=events.append)  # a cluster without one does not get one
    assert [text.split(" (")[0] for text in events if "dashboard" in text] == ["Ray's dashboard: http://127.0.0.1:8265"]
    assert asked == [("local", False), ("local", True), (address_of(listener), False)]


@pytest.mark.slow
def test_a_run_prints_the_address_of_its_dashboard(tmp_path):
    command = [
        sys.executable,
        "-m",
        "rayfed",
        "run",
        "configs/lowrank.yaml",
        "engine.kind=ray",
        "engine.dashboard=true",
    ]
    more = ["server.rounds=1", "tracking.wandb=off", "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Ray's dashboard: http://127.0.0.1:" in done.stdout


@pytest.mark.parametrize(
    ("address", "listens"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)), ("ray://head:10001", ("head", 10001)), ("ray://head", ("head", 10001)),
        ("[::1]:6379", ("::1", 6379)), ("auto", None), ("head", None), ("head:port", None), ("cloud://x:1", None),
    ],
)  # fmt: skip
def test_where_a_cluster_listens(address, listens):
    assert connect.host_and_port(address) == listens


@pytest.mark.slow
def test_the_command_says_it_in_time():
    begun = time.monotonic()
    command = [sys.executable, "-m", "rayfed", "run", "configs/lowrank.yaml", "engine.kind=ray"]
    done = subprocess.run([*command, "engine.address=127.0.0.1:1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "rayfed: engine.address: got '127.0.0.1:1', but no Ray cluster can be reached there "
        "([Errno 111] Connection refused)"
    ]
    assert time.monotonic() - begun < 25
