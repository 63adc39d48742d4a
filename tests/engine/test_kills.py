"""Many kills of workers, of the driver and of the whole job: every round has the bits of the undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from faults.kills import DRIVING, TRAINING, Attack, processes
from small_runs import lowrank, wait_for

import rayfed
from rayfed.config import dump_config
from rayfed.errors import RunError
from rayfed.tracking import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes through /proc"),
]

# A pack takes a second or more, so most kills strike one in the middle of a round, and all of them before the last.
RUN = (
    "server.rounds=30", "server.cohort=6", "client.steps=2000", "partition.clients=12", "problem.outputs=24",
    "problem.inputs=24", "problem.rows=64", "client.batch_size=64", "wire.up.density=0.5", "eval.every=10",
)  # fmt: skip
METHODS = {
    "flasc": (*RUN, "method.name=flasc", "wire.down.density=0.5", "server.rounds=40"),  # room for 100 kills
    "fedhl": (*RUN, "method.name=fedhl", "profiles.kind=tiers", "profiles.ranks=[1,2]"),
    "fedview": (*RUN, "method.name=fedview"),
    "scaffold": (*RUN, "method.name=fedit", "objective.name=scaffold", "client.momentum=0"),
    "depositum": (  # every local step is a job of its own
        *RUN, "wire.up.density=1", "method.name=ffa_lora", "topology.kind=graph", "topology.algorithm=depositum",
        "client.steps=40",
    ),
}  # fmt: skip
ON_RAY = ("engine.kind=ray", "engine.workers=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The directory of a method's run in this process."""
    runs = {}

    def run(method: str) -> Path:
        if method not in runs:
            out = tmp_path_factory.mktemp(method) / "run"
            runs[method] = rayfed.run(lowrank(*METHODS[method]), out=out).out
        return runs[method]

    return run


def same(out: Path, expected: Path) -> list[dict]:
    """The records, after a comparison: equal digests in every round, each client counted once, equal ledgers."""
    records, reference = (read_metrics(path / "metrics.jsonl") for path in (out, expected))
    for key in ("round", "state/digest", "clients/ok", "bytes/total", "train/loss"):
        assert [record[key] for record in records] == [record[key] for record in reference], key
    assert pq.read_table(out / "ledger.parquet").equals(pq.read_table(expected / "ledger.parquet"))
    return records


def report(what: str, attack: Attack, records: list[dict]) -> None:
    """For whoever runs this with -s."""
    gaps = sorted(b - a for a, b in zip(attack.delivered, attack.delivered[1:]))
    seconds = sum(record["time/round_s"] for record in records)
    print(
        f"\n{what}: {len(attack.delivered)} signals, {gaps[0]:.2f} to {gaps[-1]:.2f} s apart, {len(records)} rounds in "
        f"{seconds:.0f} s, {sum(record['clients/retried'] for record in records)} clients trained again; equal digests"
    )


@pytest.mark.parametrize(
    ("method", "kills"), [("flasc", 100), ("fedhl", 30), ("fedview", 30), ("scaffold", 10), ("depositum", 10)]
)
def test_killed_workers(ray_cluster, tmp_path, undisturbed, method, kills):
    expected = undisturbed(method)
    with Attack(kills, seed=kills) as attack:
        rayfed.run(lowrank(*METHODS[method], *ON_RAY), out=tmp_path / "run")
    records = same(tmp_path / "run", expected)
    report(f"{method}, SIGKILL", attack, records)
    assert len(attack.delivered) == kills
    assert sum(record["clients/retried"] for record in records) > kills / 5  # the others struck the start of a worker


def test_stopped_workers(ray_cluster, tmp_path, undisturbed):
    expected = undisturbed("flasc")
    with Attack(10, seed=0, title=TRAINING, signal=signal.SIGSTOP, pause=(1, 9)) as attack:
        rayfed.run(lowrank(*METHODS["flasc"], *ON_RAY, "engine.deadline=5"), out=tmp_path / "run")
    records = same(tmp_path / "run", expected)
    report("flasc, SIGSTOP", attack, records)
    assert len(attack.delivered) == 10
    assert (tmp_path / "run" / "events.log").read_text().count("a worker hung") >= 10
    assert wait_for(lambda: not any(map(psutil.pid_exists, attack.pids)), 30)  # Ray has killed all of them


def test_a_killed_driver_resumes(ray_cluster, tmp_path, undisturbed):
    expected, experiment = undisturbed("fedhl"), lowrank(*METHODS["fedhl"], *ON_RAY)
    died: list[str] = []
    with Attack(5, seed=5, title=DRIVING, pause=(3, 9)) as attack:
        while True:
            try:
                rayfed.run(experiment, out=tmp_path / "run", resume=bool(died))
                break
            except RunError as error:
                died.append(str(error))
    report("fedhl, driver killed", attack, same(tmp_path / "run", expected))
    assert len(died) == len(attack.delivered) == 5
    assert all("--resume continues from the last checkpoint" in line for line in died)


def test_a_killed_job_resumes(tmp_path, undisturbed):
    """SIGKILL to the process group of the command, in the middle of a round."""
    out, config, expected = tmp_path / "run", tmp_path / "config.yaml", undisturbed("fedview")
    config.write_text(dump_config(lowrank(*METHODS["fedview"], *ON_RAY)))
    command = [sys.executable, "-m", "rayfed", "run", str(config), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def rounds() -> int:
        path = out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def in_a_round(target: int, root: int) -> bool:
        return rounds() >= target and bool(processes(TRAINING, root))

    for kill in range(5):
        again = ["--resume"] if kill else []
        job, target = subprocess.Popen([*command, *again], env=environment, start_new_session=True), rounds() + 2
        try:
            assert wait_for(partial(in_a_round, target, job.pid))
            assert job.poll() is None
        finally:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert rounds() < 30
    assert subprocess.run([*command, "--resume"], env=environment, timeout=600).returncode == 0
    same(out, expected)
