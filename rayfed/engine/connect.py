"""Ray, started on this machine or joined at an address, with one line where that fails.

Left to itself, `ray.init` waits for minutes for a host that does not answer, and gives up on a busy machine.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import ray

from rayfed.config.execution import Engine
from rayfed.engine.placement import check_trial, trial_bundles
from rayfed.errors import RunError, UserError, allowed, first_line

TRIES = 3  # starts of Ray on this machine
ANSWER = 10.0  # seconds in which a host must accept a connection
CLIENT_PORT = 10001  # of ray:// addresses without one

Event = Callable[[str], None]


def ignore(event: str) -> None:
    """The `Event` where nobody is shown what happens."""


def start_ray(address: str | None, need: float, dashboard: bool = False, event: Event = ignore) -> None:
    """Joins the cluster at ``address`` (or RAY_ADDRESS), or starts Ray here with at least ``need`` CPUs.

    Calls ``event`` with a line first, because both take seconds. With ``dashboard`` a Ray that starts here has one, and
    ``event`` gets its address. UserError where the cluster cannot be joined, RunError where Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    joined, field = (address, "engine.address") if address else (os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS")
    with _own_sigterm():
        if joined and joined != "local":
            event(f"joining Ray at {joined}")
            url = _join(joined, field)
        else:
            event("starting Ray on this machine")
            # CPUs are bookkeeping here: more workers than cores is slow, not wrong.
            url = _start(max(os.cpu_count() or 1, math.ceil(need)), dashboard)
    if dashboard and url:
        event(f"Ray's dashboard: http://{url} (`ray get-auth-token` prints the token it may ask for)")


def join_for_trials(engines: Iterable[Engine], event: Event = ignore) -> bool:
    """Joins the cluster of trials with these settings, or starts Ray here with CPUs for any one of them.

    Returns whether Ray was started or joined now. A process that uses Ray already stays with it. UserError where the
    trials name several clusters, or where the cluster can never hold one of them.
    """
    engines = list({str(engine): engine for engine in engines}.values())
    addresses = {engine.address for engine in engines}
    if len(addresses) > 1:
        raise UserError("engine.address: trials run on one cluster, but these name several")
    if new := not ray.is_initialized():
        need = max(sum(bundle.get("CPU", 0) for bundle in trial_bundles(engine)) for engine in engines)
        start_ray(addresses.pop(), need, any(engine.dashboard for engine in engines), event)
    try:
        for engine in engines:
            check_trial(engine)
    except UserError:
        if new:
            ray.shutdown()
        raise
    return new


def _start(cpus: int, dashboard: bool) -> str | None:
    """Starts Ray on this machine with so many CPUs. RunError where it does not start.

    With ``dashboard`` returns the address of Ray's dashboard (HOST:PORT), else None.
    """
    # The default of 30 s is too short for a cold or busy machine.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    for _ in range(TRIES):
        try:
            return _init("local", cpus, dashboard) or None
        except Exception as error:  # Ray raises bare Exceptions here
            ray.shutdown()
            reason = error
    logs = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray/session_latest/logs"
    raise RunError(f"Ray did not start on this machine, tried {TRIES} times: {first_line(reason)} Its logs: {logs}")


def _join(address: str, field: str) -> str | None:
    """Joins the cluster at ``address``: HOST:PORT, ray://HOST:PORT or auto.

    Returns the address of the cluster's dashboard (HOST:PORT), None where it has none.
    UserError, which names ``field``, where no cluster answers there, or one of another version.
    """
    if (listener := host_and_port(address)) is not None:
        try:
            socket.create_connection(listener, timeout=ANSWER).close()
        except (OSError, UnicodeError) as error:
            reason = "no answer" if isinstance(error, TimeoutError) else first_line(error)
            raise allowed(field, address, f"no Ray cluster can be reached there ({reason})") from None
    try:
        return _init(address, None, False) or None
    except Exception as error:  # of many classes, by the kind of address
        ray.shutdown()
        raise allowed(field, address, f"Ray cannot join it: {' '.join(str(error).split())[:300]}") from None


def host_and_port(address: str) -> tuple[str, int] | None:
    """Where a cluster at the address listens; None where the address alone does not say that."""
    scheme, _, place = address.rpartition("://")
    try:
        parts = urlsplit(f"//{place}")
        port = parts.port or (CLIENT_PORT if scheme == "ray" else None)
    except ValueError:
        return None
    return (parts.hostname, port) if scheme in ("", "ray") and parts.hostname and port else None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Restores this process's handler of SIGTERM, in whose place `ray.init` sets its own."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _init(address: str, cpus: int | None, dashboard: bool) -> str | None:
    """Returns the address of the dashboard; none or an empty one where there is no dashboard."""
    context = ray.init(
        address=address, num_cpus=cpus, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR
    )
    return context.dashboard_url
