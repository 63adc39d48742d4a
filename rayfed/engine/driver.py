"""The driver actor: runs the rounds next to its workers and streams what happens to whoever started the run.

The driver writes the run directory; the starting process only watches. So a run goes on at the speed of the cluster,
and the terminal can be as slow as it likes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rayfed.config import Experiment
from rayfed.engine.placement import beside_the_starting_process, check_places, with_shares
from rayfed.engine.ray_executor import RayExecutor
from rayfed.errors import RunError, UserError
from rayfed.server.loop import Server
from rayfed.tasks.federation import Federation
from rayfed.tasks.models.spec import ModelSpec
from rayfed.tracking import Record, RunInfo, Sink, SinkList, Table, open_sinks

Message = tuple[str, tuple[Any, ...]]


class Outbox(Sink):
    """A sink that keeps calls until they are sent on: each a method's name and its arguments."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def start(self, info: RunInfo) -> None:
        self.messages.append(("start", (info,)))

    def round(self, record: Record) -> None:
        self.messages.append(("round", (record,)))

    def event(self, text: str) -> None:
        self.messages.append(("event", (text,)))

    def finish(self, summary: Mapping[str, Any], table: Table | None) -> None:
        self.messages.append(("finish", (summary, table)))

    def close(self) -> None:
        pass

    def drain(self) -> list[Message]:
        messages, self.messages = self.messages, []
        return messages


class Driver:
    """The actor. `run` yields the calls that a sink in the starting process should get."""

    def run(
        self, experiment: Experiment, federation: list[ray.ObjectRef], model_spec: ModelSpec, out: Path, resume: bool
    ) -> Iterator[Message]:
        import torch

        torch.set_num_threads(1)  # the driver's own sums are element-wise; its cores belong to the workers
        outbox = Outbox()
        sinks = SinkList(open_sinks(experiment.tracking, out), outbox)
        executor = RayExecutor(experiment, federation[0], model_spec)
        try:
            server = Server(experiment, ray.get(federation[0]), model_spec, executor, out, sinks, resume)
            for _ in server.rounds():
                for message in outbox.drain():  # not `yield from`: Ray resumes with send()
                    yield message
            server.finish()
            for message in outbox.drain():
                yield message
        finally:
            sinks.close()
            executor.close()


def run_on_ray(
    experiment: Experiment, federation: Federation, model_spec: ModelSpec, out: Path, resume: bool, console: Sink
) -> None:
    """Starts (or joins) Ray, runs the experiment on it, and shows ``console`` what happens.

    UserError where the cluster can never hold the workers; RunError where the run cannot go on. Ray is shut down
    again where it was started here.
    """
    ours = not ray.is_initialized()
    if ours:
        _start(experiment)
    try:
        experiment = with_shares(experiment)
        waiting = check_places(experiment)
        if waiting:
            console.event(waiting)
        actor: Any = ray.remote(num_cpus=0)(Driver)
        driver = actor.options(scheduling_strategy=beside_the_starting_process()).remote()
        try:
            # In a list, Ray passes the reference on instead of the data.
            data = [ray.put(federation)]
            stream = driver.run.options(num_returns="streaming").remote(
                experiment, data, model_spec, out.resolve(), resume
            )
            for message in stream:
                name, arguments = ray.get(message)
                getattr(console, name)(*arguments)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError | RunError) else error) from None
        except RayActorError as error:
            raise RunError(f"the driver died ({error}); --resume continues from the last checkpoint") from None
        finally:
            ray.kill(driver)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def stepwise(experiment: Experiment, federation: Federation, model_spec: ModelSpec, out: Path) -> Iterator[Server]:
    """A server in this process with Ray workers, for whoever steps through its rounds, as benchmarks do."""
    _start(experiment)
    try:
        experiment = with_shares(experiment)
        executor = RayExecutor(experiment, ray.put(federation), model_spec)
        yield Server(experiment, federation, model_spec, executor, out, SinkList(), resume=False)
        executor.close()
    finally:
        ray.shutdown()


def _start(experiment: Experiment) -> None:
    engine = experiment.engine
    start_ray(engine.address, engine.workers * engine.cpus_per_worker)


def start_ray(address: str | None, need: float) -> None:
    """Joins the cluster at ``address`` (or RAY_ADDRESS), or starts Ray here with at least ``need`` CPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    cpus = None
    if not address:
        # CPUs are bookkeeping here: more workers than cores is slow, not wrong.
        address, cpus = "local", max(os.cpu_count() or 1, math.ceil(need))
    ray.init(address=address, num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
