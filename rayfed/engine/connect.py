"""Ray, started on this machine or joined at an address, with one line where that fails.

Left to itself, `ray.init` waits for minutes for a host that does not answer, and gives up on a busy machine.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import ray

from rayfed.errors import RunError, allowed, first_line

TRIES = 3  # starts of Ray on this machine
ANSWER = 10.0  # seconds in which a host must accept a connection
CLIENT_PORT = 10001  # of ray:// addresses without one


def start(cpus: int, dashboard: bool) -> str | None:
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


def join(address: str, field: str) -> str | None:
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


def _init(address: str, cpus: int | None, dashboard: bool) -> str | None:
    """Returns the address of the dashboard; none or an empty one where there is no dashboard."""
    context = ray.init(
        address=address, num_cpus=cpus, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR
    )
    return context.dashboard_url
