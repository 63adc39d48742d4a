"""Workers for which Ray has no room, and workers that die every time, end in one line."""

import os
import signal
import threading
import time

import psutil
import pytest
import ray
from ray.exceptions import RayActorError
from small_runs import wait_for

import rayfed
from rayfed.clients.messages import ClientOrder, TrainJob
from rayfed.config.execution import Engine
from rayfed.engine.driver import Outbox
from rayfed.engine.ray_executor import RayExecutor
from rayfed.errors import RunError, Stopped, UserError
from rayfed.server.executor import Submission


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("engine.gpus_per_worker=0.5", "engine.gpus_per_worker: got 0.5 for each of 2 workers, but Ray has 0 GPUs"),
        ("engine.cpus_per_worker=64", "engine.cpus_per_worker: got 64 for each of 2 workers, but Ray has 4 CPUs"),
    ],
)
def test_workers_that_never_fit_are_refused_before_anything_is_written(tiny, tmp_path, ray_cluster, setting, line):
    with pytest.raises(UserError) as refusal:
        rayfed.run(tiny("engine.kind=ray", setting), out=tmp_path / "run")
    assert str(refusal.value) == line
    assert not (tmp_path / "run").exists()


class Calm:
    """Stands for a worker that does its job at once."""

    def load(self, plan):
        pass

    def execute(self, *_):
        return "done"


class Poisoned(Calm):
    """Its process dies at every job that trains client 7."""

    def execute(self, job, *_):
        if job.orders[0].client == 7:
            os._exit(1)
        return "done"


def training(*clients: int) -> TrainJob:
    return TrainJob(2, 0.1, tuple(ClientOrder(c, None, 0, None, 0, 1.0, "fp32") for c in clients))


def test_a_pack_that_kills_every_worker_ends_the_run_with_its_clients(ray_cluster, monkeypatch):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Poisoned)
    executor = RayExecutor(Engine(workers=1, retries=2), ray.put(None))
    results = []
    with pytest.raises(RunError, match=r"round 3, training clients 7, 8: its worker was lost \d times in a row"):
        results.extend(executor.run([Submission(training(c)) for c in range(6)] + [Submission(training(7, 8))]))
    events = executor.drain_events()
    assert 2 < len(events) < 9
    assert all("round 3, training clients 7, 8 runs again" in event for event in events)
    assert executor.drain_events() == []
    executor.close()


class Stillborn(Calm):
    """Stands for a worker that cannot load its model."""

    def load(self, plan):
        raise OSError("no such weights")


def test_workers_that_cannot_load_their_model_end_the_run(ray_cluster, monkeypatch):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Stillborn)
    executor = RayExecutor(Engine(workers=1, retries=0), ray.put(None))
    with pytest.raises(RunError, match="workers failed to start 1 times: OSError: no such weights"):
        list(executor.run([Submission(training(1))]))
    executor.close()


class Stoppable(Calm):
    """Stops its own process, as SIGSTOP from outside does, where it trains client 7 and the folder has no mark yet."""

    def load(self, plan):
        self.folder = plan

    def execute(self, job, *_):
        if job.orders[0].client == 7 and not (self.folder / "stopped").exists():
            (self.folder / "stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return f"client {job.orders[0].client}"


def test_a_hung_worker_is_killed_and_replaced(ray_cluster, monkeypatch, tmp_path):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Stoppable)
    executor = RayExecutor(Engine(workers=2, deadline=0.5), ray.put(tmp_path))
    done = list(executor.run([Submission(training(c)) for c in (7, 8)]))
    assert sorted((d.index, d.result, d.retries) for d in done) == [(0, "client 7", 1), (1, "client 8", 0)]
    (event,) = executor.drain_events()
    assert event.startswith("a worker hung (no answer in 0.5 s, its deadline); round 3, training client 7 runs again")
    hung = int((tmp_path / "stopped").read_text())
    assert wait_for(lambda: not psutil.pid_exists(hung) or psutil.Process(hung).status() == "zombie", 20)
    executor.close()


class Sleepy(Calm):
    """Client 7 takes a minute."""

    def execute(self, job, *_):
        if job.orders[0].client == 7:
            time.sleep(60)
        return "done"


def test_a_stopped_executor_says_so_within_a_second(ray_cluster, monkeypatch):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Sleepy)
    executor = RayExecutor(Engine(workers=1), ray.put(None))
    results = executor.run([Submission(training(1)), Submission(training(7))])
    assert next(results).index == 0
    threading.Timer(0.2, executor.stop).start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        next(results)
    assert time.monotonic() - begun < 1.5
    executor.close()


def gone(worker):
    try:
        ray.get(worker.__ray_ready__.remote())
    except RayActorError:
        return True
    return False


@pytest.mark.slow
def test_idle_workers_that_died_together_cost_one_job_one_retry(ray_cluster, monkeypatch):
    """As when a node is lost between two rounds: the job is not offered to one dead worker after the other."""
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Calm)
    executor = RayExecutor(Engine(workers=4, cpus_per_worker=0.25, retries=1), ray.put(None))
    while executor.pool.starting:
        assert [done.result for done in executor.run([Submission(training(1))])] == ["done"]
    for worker in executor.pool.ready:
        ray.kill(worker)
        while not gone(worker):  # a kill takes a moment
            pass
    (done,) = executor.run([Submission(training(1))])
    assert (done.result, done.retries) == ("done", 1)
    executor.close()


def test_the_outbox_repeats_every_call_in_order():
    outbox, heard = Outbox(), []
    outbox.start("info")
    outbox.round({"round": 1})
    outbox.event("text")
    outbox.finish({}, None)
    outbox.close()
    for name, arguments in outbox.drain():
        heard.append((name, len(arguments)))
    assert heard == [("start", 1), ("round", 1), ("event", 1), ("finish", 2)]
    assert outbox.drain() == []
