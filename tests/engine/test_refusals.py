"""Workers for which Ray has no room, and workers that die every time, end in one line."""

import pytest
import ray
from ray.exceptions import RayActorError

import rayfed
from rayfed.config.execution import Engine
from rayfed.engine.driver import Outbox
from rayfed.engine.ray_executor import RayExecutor
from rayfed.errors import RunError, UserError
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


class Doomed:
    """Stands for a worker whose process dies at every job."""

    def __init__(self, *_):
        pass

    def execute(self, *_):
        import os

        os._exit(1)


def test_a_job_that_kills_every_worker_ends_the_run(ray_cluster, monkeypatch):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Doomed)
    executor = RayExecutor(Engine(workers=1, retries=1), ray.put(None))
    with pytest.raises(RunError, match="failed 2 times because its worker died"):
        list(executor.run([Submission(None)]))
    assert len(executor.drain_events()) == 1
    assert executor.drain_events() == []
    executor.close()


class Stillborn:
    """Stands for a worker that cannot load its model."""

    def __init__(self, *_):
        raise OSError("no such weights")


def test_workers_that_never_start_end_the_run(ray_cluster, monkeypatch):
    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Stillborn)
    executor = RayExecutor(Engine(workers=1, retries=1), ray.put(None))
    with pytest.raises(RunError, match="workers died 2 times before their first job: OSError: no such weights"):
        list(executor.run([Submission(None)]))
    executor.close()


class Calm:
    """Stands for a worker that does its job at once."""

    def __init__(self, *_):
        pass

    def execute(self, *_):
        return "done"


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
    while executor.starting:
        assert [done.result for done in executor.run([Submission(None)])] == ["done"]
    for worker in executor.workers:
        ray.kill(worker)
        while not gone(worker):  # a kill takes a moment
            pass
    (done,) = executor.run([Submission(None)])
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
