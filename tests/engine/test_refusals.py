"""Workers for which Ray has no room, and workers that die every time, end in one line."""

import os
import re
import signal
import sys
import threading
import time

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, remove_placement_group

import rayfed
from rayfed.clients.messages import ClientOrder, TrainJob
from rayfed.config.execution import Engine
from rayfed.engine.driver import Outbox
from rayfed.engine.placement import reserve
from rayfed.engine.ray_executor import RayExecutor
from rayfed.errors import RunError, Stopped, UserError
from rayfed.server.executor import Submission

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers get the classes below without this module


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
    """Stands for a worker that does its job, a text, at once."""

    def load(self, plan):
        self.plan = plan

    def execute(self, job, *_):
        return f"{job} done"


class Poisoned(Calm):
    """Its process dies at every job that trains client 7."""

    def execute(self, job, *_):
        if job.orders[0].client == 7:
            os._exit(1)
        return "done"


def training(*clients: int) -> TrainJob:
    return TrainJob(2, 0.1, tuple(ClientOrder(c, None, 0, None, 0, 1.0, "fp32") for c in clients))


@pytest.mark.slow
def test_a_pack_that_kills_every_worker_ends_the_run_with_its_clients(ray_cluster, monkeypatch):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Poisoned)
    executor = RayExecutor(Engine(workers=1, retries=2), ray.put(None))
    with pytest.raises(RunError, match=r"round 3, training clients 7, 8: its worker was lost 12 times in a row"):
        list(executor.run([Submission(training(c)) for c in range(6)] + [Submission(training(7, 8))]))
    executor.subscribe((events := []).append)
    assert len(events) == 11
    assert all("round 3, training clients 7, 8 runs again" in event for event in events)
    executor.close()


class Stillborn(Calm):
    """Stands for a worker that cannot load its model."""

    def load(self, plan):
        raise OSError("no such weights")


def test_workers_that_cannot_load_their_model_end_the_run(ray_cluster, monkeypatch):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Stillborn)
    executor = RayExecutor(Engine(workers=1, retries=0), ray.put(None))
    with pytest.raises(RunError, match="no worker could be started, tried 1 times: OSError: no such weights"):
        list(executor.run([Submission("a job")]))
    executor.close()


class Elsewhere(Calm):
    """The first process that loads computes on one kind of CPU, and all others on another."""

    def load(self, plan):
        first = plan / "first"
        try:
            first.touch(exist_ok=False)
        except FileExistsError:
            return "Vendor AVX2"
        return "Vendor AVX512"


@pytest.mark.parametrize("resumed_from", [None, "Vendor SSE"])
def test_a_worker_of_another_capability_is_told(ray_cluster, monkeypatch, tmp_path, resumed_from):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Elsewhere)
    executor = RayExecutor(Engine(workers=2), ray.put(tmp_path))
    if resumed_from:
        executor.capability = resumed_from
    executor.subscribe((events := []).append)
    while len(executor.pool.ready) < 2:
        list(executor.run([Submission("a job")]))
    assert len(events) == (2 if resumed_from else 1)
    first = resumed_from or executor.capability
    for event in events:
        assert re.match(rf"a worker trains on Vendor AVX\d+, and this run began on {first}: they may round", event)
    executor.close()


class Hanging(Calm):
    """The first of the processes that gets the job "hang" stops itself, as SIGSTOP from outside does."""

    def execute(self, job, *_):
        mark = self.plan / "stopped"
        if job == "hang" and not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().execute(job)


def test_a_hung_worker_is_killed_and_its_job_runs_again(ray_cluster, monkeypatch, tmp_path):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Hanging)
    executor = RayExecutor(Engine(workers=2, deadline=1), ray.put(tmp_path))
    executor.subscribe((events := []).append)
    done = []
    for result in executor.run([Submission("hang"), Submission("work")]):
        done.append((result.index, result.result, result.retries))
        assert result.index or events, "the event is out before the job's result"
    assert sorted(done) == [(0, "hang done", 1), (1, "work done", 0)]
    assert events == ["a worker hung (no answer in 1 s, its deadline); a job runs again"]
    executor.close()


@pytest.mark.slow
def test_workers_without_a_place_end_the_run(ray_cluster):
    """As where other work holds the cluster's CPUs."""
    (everything := placement_group([{"CPU": 4}])).wait(30)
    group = reserve(engine := Engine(workers=1, stall_s=1.0))
    executor = RayExecutor(engine, ray.put(None), group)
    with pytest.raises(RunError, match="no worker has got a place"):
        list(executor.run([Submission("work")]))
    executor.close()
    remove_placement_group(everything)


class Slow(Calm):
    """The job "sleep" takes a minute."""

    def execute(self, job, *_):
        if job == "sleep":
            time.sleep(60)
        return super().execute(job)


def test_a_run_that_is_asked_to_stop_ends_within_a_second(ray_cluster, monkeypatch):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Slow)
    executor = RayExecutor(Engine(workers=1), ray.put(None))
    results = executor.run([Submission("work"), Submission("sleep")])
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
        assert [done.result for done in executor.run([Submission("work")])] == ["work done"]
    for worker in executor.pool.ready:
        ray.kill(worker)
        while not gone(worker):  # a kill takes a moment
            pass
    (done,) = executor.run([Submission("work")])
    assert (done.result, done.retries) == ("work done", 1)
    executor.close()


def test_the_outbox_repeats_every_call_in_order():
    outbox, heard = Outbox(), []
    outbox.start("info")
    outbox.event("text")
    outbox.finish({}, None)
    outbox.close()
    outbox.messages.put(None)
    for name, arguments in iter(outbox.messages.get, None):
        heard.append((name, len(arguments)))
    assert heard == [("start", 1), ("event", 1), ("finish", 2)]
