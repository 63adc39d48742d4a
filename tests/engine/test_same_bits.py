"""The state has the same bits wherever clients train, and whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import ray
from small_runs import lowrank, wait_for

import rayfed
from rayfed.api import prepare
from rayfed.clients.messages import EvalJob, TrainJob
from rayfed.config import dump_config, load_config
from rayfed.engine.ray_executor import RayExecutor, Worker
from rayfed.errors import RunError
from rayfed.methods import METHODS, build
from rayfed.server import checkpoint as checkpoints
from rayfed.server.loop import Server
from rayfed.tracking import SinkList, read_metrics

# Evaluated at the end only: whoever is killed before was training. Packs of two come back as sums.
SPARSE = ("wire.down.density=0.25", "wire.up.density=0.25")
RUN = (*SPARSE, "server.rounds=8", "server.cohort=5", "eval.every=8", "engine.pack=2")


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes through /proc")


@pytest.fixture(scope="module")
def digests(tiny, tmp_path_factory):
    """The digests of every round of the in-process run: what all others must give."""
    result = rayfed.run(tiny(*RUN), out=tmp_path_factory.mktemp("local") / "run")
    return [record["state/digest"] for record in result.metrics]


def digests_of(out: Path) -> list[str]:
    return [record["state/digest"] for record in read_metrics(out / "metrics.jsonl")]


def rounds_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_a_training_worker() -> bool:
    """SIGKILL to one of this process's workers that is busy; Ray names a process after the method it runs.

    A job takes milliseconds, so /proc is read for names first and asked for parents only where the name is right.
    """
    for entry in Path("/proc").iterdir():
        try:
            if (entry / "cmdline").read_bytes().startswith(b"ray::Worker.execute"):
                process = psutil.Process(int(entry.name))
                if os.getpid() in (parent.pid for parent in process.parents()):
                    process.kill()
                    return True
        except (OSError, ValueError, psutil.Error):
            continue
    return False


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_this_process_and_on_ray(tmp_path, ray_cluster, method):
    """One chain: equal messages, byte for byte, and equal states in every round."""
    mix = ("profiles.kind=tiers", "profiles.ranks=[1,2]") if build(method).mixed_ranks else ()
    settings = ("server.rounds=4", "server.cohort=5", "engine.pack=2", f"method.name={method}", *mix)
    here = rayfed.run(lowrank(*settings), out=tmp_path / "here").metrics
    there = rayfed.run(lowrank(*settings, "engine.kind=ray", "engine.workers=2"), out=tmp_path / "there").metrics
    assert [record["state/chain"] for record in there] == [record["state/chain"] for record in here]
    assert len({record["state/chain"] for record in here}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_ray_workers(tiny, tmp_path, ray_cluster, digests, workers):
    result = rayfed.run(tiny(*RUN, "engine.kind=ray", f"engine.workers={workers}"), out=tmp_path / "run")
    assert digests_of(result.out) == digests
    assert all(record["clients/retried"] == 0 for record in result.metrics)


@pytest.mark.slow
def test_a_worker_measures_and_the_run_is_the_one_with_the_number(tiny, tmp_path, ray_cluster):
    result = rayfed.run(tiny(*RUN, "engine.kind=ray", "engine.workers=3", "engine.pack=auto"), out=tmp_path / "run")
    size = load_config(result.out / "config.yaml").engine.pack
    assert size in (1, 2)  # 5 clients and 3 workers
    record = json.loads((result.out / "pack.json").read_text())
    assert (record["size"], record["workers"], [m["size"] for m in record["measured"]]) == (size, 3, [1, 2])
    pinned = rayfed.run(tiny(*RUN, f"engine.pack={size}"), out=tmp_path / "pinned")
    assert digests_of(result.out) == digests_of(pinned.out)


@needs_proc
def test_a_killed_worker_costs_a_retry_and_nothing_else(tiny, tmp_path, ray_cluster, digests):
    out, killed = tmp_path / "run", []

    def strike() -> None:
        killed.append(wait_for(lambda: rounds_done(out) >= 1) and wait_for(kill_a_training_worker))

    thread = threading.Thread(target=strike)
    thread.start()
    result = rayfed.run(tiny(*RUN, "engine.kind=ray", "engine.workers=2"), out=out)
    thread.join()
    assert killed == [True]
    assert digests_of(out) == digests
    assert sum(record["clients/retried"] for record in result.metrics) > 0
    assert "a worker died" in (out / "events.log").read_text()


EVALUATED = (*SPARSE, "server.rounds=4", "server.cohort=5", "engine.pack=2", "eval.batch_size=4")


def served(experiment, out: Path, executor) -> list[dict]:
    """The records of a server in this process, without times."""
    plan = prepare(experiment)
    server = Server(plan, executor(plan.engine, ray.put(plan)), out, SinkList(), False)
    try:
        return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in server.rounds()]
    finally:
        server.executor.close()


@pytest.mark.slow
def test_workers_that_die_in_an_evaluation_change_no_metric(tiny, tmp_path, ray_cluster):
    """All workers are killed in every evaluation, after its first result."""
    struck = []

    class Striking(RayExecutor):
        def run(self, submissions):
            for i, done in enumerate(super().run(submissions)):
                yield done
                if i == 0 and isinstance(submissions[0].job, EvalJob):
                    struck.append(len(submissions))
                    for worker in self.pool.ready:
                        ray.kill(worker)

    here = rayfed.run(tiny(*EVALUATED), out=tmp_path / "here").metrics
    there = served(tiny(*EVALUATED, "engine.kind=ray"), tmp_path / "there", Striking)
    assert len(struck) == 4  # once in the evaluation of every round
    assert min(struck) > 1
    assert there == [{k: v for k, v in record.items() if not k.startswith("time/")} for record in here]


@pytest.mark.slow
def test_a_pack_that_kills_its_worker_leaves_the_round_before_it(tiny, tmp_path, ray_cluster, monkeypatch):
    class Mortal(Worker):
        def execute(self, job, *payloads):
            if isinstance(job, TrainJob) and job.t == 2 and len(job.orders) == 1:  # one of three packs
                os._exit(1)
            return super().execute(job, *payloads)

    monkeypatch.setattr("rayfed.engine.ray_executor.Worker", Mortal)
    experiment, out = tiny(*EVALUATED, "engine.kind=ray", "engine.workers=3", "engine.retries=0"), tmp_path / "run"
    with pytest.raises(RunError, match=r"round 3, training client \d+: its worker was lost \d+ times"):
        served(experiment, out, RayExecutor)
    assert checkpoints.manifests(out / "checkpoints")[0].round == 2


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_bits(tiny, tmp_path, digests, engine):
    """SIGKILL to the whole run after its second round; `--resume` repeats no finished round and ends alike."""
    out, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(dump_config(tiny(*RUN, f"engine.kind={engine}")))
    command = [sys.executable, "-m", "rayfed", "run", str(config), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert wait_for(lambda: rounds_done(out) >= 2 or process.poll() is not None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = rounds_done(out)
    assert 2 <= done < 8
    early = (out / "metrics.jsonl").read_text().splitlines()[: done - 1]
    assert subprocess.run([*command, "--resume"], env=environment, timeout=240).returncode == 0
    assert digests_of(out) == digests
    assert (out / "metrics.jsonl").read_text().splitlines()[: done - 1] == early
