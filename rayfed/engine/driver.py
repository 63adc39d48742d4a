"""The driver actor: runs the rounds next to its workers and streams what happens to the process that started the run.

The driver writes the run directory; the starting process only watches. So a run goes on at the speed of the cluster,
and the terminal can be slow.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from rayfed.clients.plan import RunPlan
from rayfed.config.execution import Engine
from rayfed.engine.callbacks import Callback
from rayfed.engine.connect import Event, ignore, start_ray
from rayfed.engine.placement import check_places, named, on_this_node, release, reserve, with_gpu_share
from rayfed.engine.ray_executor import RayExecutor
from rayfed.engine.ray_metrics import RayMetrics
from rayfed.engine.rounds import run_rounds, with_pack_size
from rayfed.errors import RunError, Stopped, UserError, allowed, class_and_line, first_line
from rayfed.run_directory import disk_errors, lock_alone, locked
from rayfed.server.loop import Server
from rayfed.tracking import Record, RunInfo, Sink, SinkList, Table, open_sinks

Message = tuple[str, tuple[Any, ...]]

CONTINUES = "--resume continues from the last checkpoint"
SECONDS_TO_STOP = 10.0
"""How long a driver that is asked to stop may take. Then it is killed."""


class Outbox(Sink):
    """A sink that queues its calls for another thread: each is a method's name and its arguments.

    The driver adds the calls of `round`, each when the round's checkpoint is written.
    """

    def __init__(self) -> None:
        self.messages: SimpleQueue[Message | None] = SimpleQueue()  # None: there are no more

    def start(self, info: RunInfo) -> None:
        self.messages.put(("start", (info,)))

    def event(self, text: str) -> None:
        self.messages.put(("event", (text,)))

    def finish(self, summary: Record, table: Table | None) -> None:
        self.messages.put(("finish", (summary, table)))


class Driver:
    """The actor. `run` yields the calls that a sink in the starting process gets.

    Meanwhile `stop` may be called, and `proceed`, which lets a run with ``waits`` begin its next round.
    """

    def __init__(self) -> None:
        self.executor: RayExecutor | None = None
        self.outbox = Outbox()
        self.stopping, self.ended = threading.Event(), threading.Event()
        self.permits = threading.Semaphore(0)  # rounds that may begin, where the run waits

    def run(self, *arguments: Any) -> Iterator[Message]:
        """Runs `_run` with the arguments in another thread, and yields every message as soon as it is there."""
        run = ThreadPoolExecutor(max_workers=1).submit(self._run, *arguments)
        run.add_done_callback(lambda _: self.outbox.messages.put(None))
        # No `yield from iter(...)`: Ray closes a generator that delegates after its first message.
        while (message := self.outbox.messages.get()) is not None:
            yield message
        run.result()

    def _run(
        self, plan: RunPlan, group: PlacementGroup | None, out: Path, resume: bool, uri: str | None, callbacks: bytes,
        waits: bool,
    ) -> None:  # fmt: skip
        import torch

        torch.set_num_threads(1)  # the driver's own sums are element-wise; its cores belong to the workers
        with suppress(Stopped), ExitStack() as stack:
            # Entered first, so closed last: where Ray itself is gone, this takes long.
            self.executor = stack.enter_context(closing(RayExecutor(plan.engine, ray.put(plan), group, plan.name)))
            stack.callback(self.ended.set)
            stack.enter_context(locked(out, shared=True))  # this process may outlive the one that started it
            stack.enter_context(disk_errors(out))
            tracked = open_sinks(plan.tracking, out, self.outbox)
            sinks = stack.enter_context(closing(SinkList(tracked, RayMetrics(plan, self.executor))))
            rounds = run_rounds(plan, self.executor, out, sinks, resume, uri, cloudpickle.loads(callbacks))
            for record in stack.enter_context(closing(rounds)):
                self.outbox.messages.put(("round", (record,)))
                if waits:
                    self.permits.acquire()
                if self.stopping.is_set():
                    raise Stopped("the run was asked to stop")

    def proceed(self) -> None:
        """Lets the next round begin."""
        self.permits.release()

    def stop(self) -> None:
        """Asks `run` to end, and returns when it has."""
        self.stopping.set()
        self.permits.release()
        if self.executor is not None:
            self.executor.stop()
        self.ended.wait()


def run_on_ray(
    plan: RunPlan, out: Path, resume: bool, uri: str | None, console: Sink, callbacks: Sequence[Callback] = (),
    waits: bool = False,
) -> Generator[Record]:  # fmt: skip
    """Starts (or joins) Ray, runs the plan on it, and shows ``console`` what happens. Yields each round's record.

    With ``waits`` the next round begins when its record is asked for. Otherwise the driver runs ahead. UserError where
    the cluster can never hold the workers, or a callback cannot be pickled; RunError where the run cannot go on. Ray is
    shut down again where it was started here.
    """
    _pickle_by_value(plan, callbacks)
    _check_pickles(plan)
    pickled = _pickled(callbacks)
    with _ray(plan.engine, console.event):
        plan = with_gpu_share(plan)
        if waiting := check_places(plan.engine):
            console.event(waiting)
        actor: Any = ray.remote(num_cpus=0)(Driver)
        driver = actor.options(**on_this_node(), **named(plan.name, "driver"), max_concurrency=3).remote()
        group = reserve(plan.engine)
        try:
            run = driver.run.options(num_returns="streaming")
            for message in run.remote(ray.put(plan), group, out.resolve(), resume, uri, pickled, waits):
                name, arguments = ray.get(message)
                getattr(console, name)(*arguments)
                if name == "round":
                    yield arguments[0]
                    if waits:
                        driver.proceed.remote()
        except RayTaskError as error:
            if isinstance(error.cause, RayError):
                raise RunError(f"Ray cannot go on ({class_and_line(error.cause)}); {CONTINUES}") from None
            raise (error.cause if isinstance(error.cause, UserError | RunError) else error) from None
        except RayActorError as error:
            release(group)  # the driver did not; its workers died with it
            raise RunError(f"the driver died ({first_line(error)}); {CONTINUES}") from None
        except RayError as error:  # such as a full disk below Ray's own folder
            raise RunError(f"Ray cannot go on ({class_and_line(error)}); {CONTINUES}") from None
        except (KeyboardInterrupt, GeneratorExit):
            # Ctrl-C or SIGTERM (where all processes got it, Ray may be gone already), or nobody asks for more records.
            _stop(driver, out)
            raise
        finally:
            with suppress(RayError):
                ray.kill(driver)


@contextmanager
def stepwise(plan: RunPlan, out: Path) -> Iterator[Server]:
    """A server in this process with Ray workers, to step through its rounds, as benchmarks do."""
    with _ray(plan.engine):
        plan = with_gpu_share(plan)
        executor = RayExecutor(plan.engine, ray.put(plan), reserve(plan.engine), plan.name)
        plan, choice = with_pack_size(plan, executor)
        yield Server(plan, executor, out, SinkList(), False, choice)
        executor.close()


@contextmanager
def _ray(engine: Engine, event: Event = ignore) -> Iterator[None]:
    """Ray as long as the block runs: the one that this process uses already, or one that is started and shut down."""
    ours = not ray.is_initialized()
    if ours:
        start_ray(engine.address, engine.workers * engine.cpus_per_worker, engine.dashboard, event)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _stop(driver: Any, out: Path) -> None:
    """Asks the driver to stop and waits for its end, at most SECONDS_TO_STOP."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    with suppress(RayError):
        stopped = driver.stop.remote()
        while time.monotonic() < deadline and not lock_alone(out):
            if ray.wait([stopped], timeout=0.2)[0]:
                return


def _pickle_by_value(plan: RunPlan, callbacks: Sequence[Callback]) -> None:
    """Sends the code of a user's own classes and functions along: workers may be unable to import their modules."""
    function = (plan.profiles.settings.function or "").partition(":")[0]
    inner = getattr(plan.method, "method", None)  # on a graph
    algorithm = plan.topology and plan.topology.algorithm
    parts = (plan.method, inner, algorithm, plan.objective, plan.task, *plan.task.parts, *callbacks)
    for name in (*(str(getattr(part, "__module__", "")) for part in parts), function):
        package = name.partition(".")[0]
        if package not in ("", "rayfed", "torch", "transformers", "__main__", "builtins") and name in sys.modules:
            cloudpickle.register_pickle_by_value(sys.modules.get(package, sys.modules[name]))


def _check_pickles(plan: RunPlan) -> None:
    """UserError where a task or a method that a user gives cannot be sent to the workers."""
    for field, part in (("task", plan.task), ("method", plan.method)):
        try:
            cloudpickle.dumps(part)
        except Exception as error:
            what = f"it cannot be pickled, and on Ray it is sent to the workers ({class_and_line(error)})"
            raise allowed(field, type(part).__name__, what) from None


def _pickled(callbacks: Sequence[Callback]) -> bytes:
    """The callbacks as bytes, which the plan's workers need not load. UserError where one cannot be pickled."""
    for callback in callbacks:
        try:
            cloudpickle.dumps(callback)
        except Exception as error:
            what = f"it cannot be pickled, and on Ray it is sent to the driver ({class_and_line(error)})"
            raise allowed("callbacks", type(callback).__name__, what) from None
    return bytes(cloudpickle.dumps(tuple(callbacks)))
