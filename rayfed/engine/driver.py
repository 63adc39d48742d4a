"""The driver actor: runs the rounds next to its workers and streams what happens to the process that started the run.

The driver writes the run directory; the starting process only watches. So a run goes on at the speed of the cluster,
and the terminal can be slow.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rayfed.clients.plan import RunPlan
from rayfed.config.execution import Engine
from rayfed.engine import connect
from rayfed.engine.placement import check_places, on_this_node, with_gpu_share
from rayfed.engine.ray_executor import RayExecutor
from rayfed.engine.rounds import run_rounds, with_pack_size
from rayfed.errors import RunError, UserError
from rayfed.server.loop import Server
from rayfed.tracking import Record, RunInfo, Sink, SinkList, Table, open_sinks

Message = tuple[str, tuple[Any, ...]]


class Outbox(Sink):
    """A sink that stores calls until they are sent on: each is a method's name and its arguments."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def start(self, info: RunInfo) -> None:
        self.messages.append(("start", (info,)))

    def round(self, record: Record) -> None:
        self.messages.append(("round", (record,)))

    def event(self, text: str) -> None:
        self.messages.append(("event", (text,)))

    def finish(self, summary: Record, table: Table | None) -> None:
        self.messages.append(("finish", (summary, table)))

    def drain(self) -> list[Message]:
        messages, self.messages = self.messages, []
        return messages


class Driver:
    """The actor. `run` yields the calls that a sink in the starting process gets."""

    def run(self, plan: RunPlan, out: Path, resume: bool, uri: str | None) -> Iterator[Message]:
        import torch

        torch.set_num_threads(1)  # the driver's own sums are element-wise; its cores belong to the workers
        outbox = Outbox()
        sinks = SinkList(open_sinks(plan.tracking, out), outbox)
        executor = RayExecutor(plan.engine, ray.put(plan))
        try:
            for _ in run_rounds(plan, executor, out, sinks, resume, uri):
                for message in outbox.drain():  # noqa: UP028 (not `yield from`: Ray resumes with send())
                    yield message
        finally:
            sinks.close()
            executor.close()


def run_on_ray(plan: RunPlan, out: Path, resume: bool, uri: str | None, console: Sink) -> None:
    """Starts (or joins) Ray, runs the plan on it, and shows ``console`` what happens.

    UserError where the cluster can never hold the workers; RunError where the run cannot go on. Ray is shut down again
    where it was started here.
    """
    with _ray(plan.engine):
        plan = with_gpu_share(plan)
        if waiting := check_places(plan.engine):
            console.event(waiting)
        _pickle_by_value(plan)
        actor: Any = ray.remote(num_cpus=0)(Driver)
        driver = actor.options(scheduling_strategy=on_this_node()).remote()
        try:
            stream = driver.run.options(num_returns="streaming").remote(ray.put(plan), out.resolve(), resume, uri)
            for message in stream:
                name, arguments = ray.get(message)
                getattr(console, name)(*arguments)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError | RunError) else error) from None
        except RayActorError as error:
            raise RunError(f"the driver died ({error}); --resume continues from the last checkpoint") from None
        finally:
            ray.kill(driver)


@contextmanager
def stepwise(plan: RunPlan, out: Path) -> Iterator[Server]:
    """A server in this process with Ray workers, to step through its rounds, as benchmarks do."""
    with _ray(plan.engine):
        plan = with_gpu_share(plan)
        executor = RayExecutor(plan.engine, ray.put(plan))
        plan, choice = with_pack_size(plan, executor)
        yield Server(plan, executor, out, SinkList(), False, choice)
        executor.close()


def start_ray(address: str | None, need: float) -> None:
    """Joins the cluster at ``address`` (or RAY_ADDRESS), or starts Ray here with at least ``need`` CPUs.

    UserError where the cluster cannot be joined, RunError where Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    joined, field = (address, "engine.address") if address else (os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS")
    if joined and joined != "local":
        connect.join(joined, field)
    else:
        # CPUs are bookkeeping here: more workers than cores is slow, not wrong.
        connect.start(max(os.cpu_count() or 1, math.ceil(need)))


@contextmanager
def _ray(engine: Engine) -> Iterator[None]:
    """Ray as long as the block runs: the one that this process uses already, or one that is started and shut down."""
    ours = not ray.is_initialized()
    if ours:
        start_ray(engine.address, engine.workers * engine.cpus_per_worker)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _pickle_by_value(plan: RunPlan) -> None:
    """Sends the code of a user's own classes and functions along: workers may be unable to import their modules."""
    from ray import cloudpickle

    function = (plan.profiles.settings.function or "").partition(":")[0]
    for name in (type(plan.method).__module__, type(plan.task).__module__, function):
        package = name.partition(".")[0]
        if package not in ("", "rayfed", "__main__", "builtins") and name in sys.modules:
            cloudpickle.register_pickle_by_value(sys.modules.get(package, sys.modules[name]))
