"""Sweeps on Ray Tune itself. All but one test are slow: the others start processes for many trials."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import wait_for
from sweep_files import decisions, files, planned, read_rows, statuses
from wandb_files import runs

import rayfed
from rayfed.config.execution import Engine
from rayfed.errors import UserError
from rayfed.sweeps.plan import trial_folder
from rayfed.sweeps.sweep import run_sweep
from rayfed.tracking import read_metrics

OFFLINE = {"WANDB_MODE": "offline"}


def last_digest(folder: Path) -> str:
    return read_metrics(folder / "metrics.jsonl")[-1]["state/digest"]


def test_two_trials_on_ray_tune(ray_cluster, sweep_file, tmp_path: Path) -> None:
    """Two trials: one ends, one fails. Each is reported once it is recorded, and has the results of a run alone."""
    section = {"parameters": {"client.lr": {"grid": [0.02, 1e30]}}, "concurrency": 1}  # one process for both
    path, out = sweep_file(section), tmp_path / "out"
    ended: dict[str, Any] = {}
    result = run_sweep(path, out=out, on_trial_end=lambda trial: ended.update({trial.name: statuses(out)[trial.name]}))
    assert ended == {"lr=0.02": "done", "lr=1e+30": "failed"}
    assert statuses(out) == {"lr=0.02": "done", "lr=1e+30": "failed"}
    assert [row["trial"] for row in result.failed] == ["lr=1e+30"]
    (trial, _), _ = planned(path)
    alone = rayfed.run(trial.experiment, tmp_path / "alone")
    assert last_digest(trial_folder(out, trial.name)) == alone.metrics[-1]["state/digest"]


def start_and_kill(path: Path, out: Path, when: Callable[[], object]) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Starts `rayfed sweep` and kills it with signal 9 when the condition is true. Returns a function that resumes."""
    command = [sys.executable, "-m", "rayfed", "sweep", str(path), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | OFFLINE
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert wait_for(when)
    finally:
        process.kill()
        process.wait()
    return lambda: subprocess.run(
        [*command, "--resume"], env=environment, timeout=300, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_killed_sweep_resumes_and_a_failed_trial_stops_no_other(sweep_file, tmp_path: Path) -> None:
    """Killed during the third trial: `--resume` leaves the first alone, continues the third and runs the fourth."""
    section = {"parameters": {"client.lr": {"grid": [0.02, 1e30, 0.05, 0.1]}}, "concurrency": 1}  # 1e30 diverges
    tracking = {"wandb": "offline", "artifact": False}
    path = sweep_file(section, server={"rounds": 1200}, checkpoint={"every": 5}, tracking=tracking)
    out = tmp_path / "out"
    first, third = out / "trials" / "lr=0.02", out / "trials" / "lr=0.05"
    resume = start_and_kill(path, out, lambda: list(third.glob("checkpoints/round-*")))
    ended = {"lr=0.02": "done", "lr=1e+30": "failed"}
    assert statuses(out) == ended | {"lr=0.05": "unfinished", "lr=0.1": "unfinished"}
    before = files(first)

    again = resume()
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("rayfed: 1 of 4 trials did not finish; --resume tries them again")
    assert statuses(out) == ended | {"lr=0.05": "done", "lr=0.1": "done"}
    assert files(first) == before
    assert "resume after round" in (third / "events.log").read_text()
    rounds = read_metrics(third / "metrics.jsonl")
    assert [record["round"] for record in rounds] == list(range(1, 1201))
    tracked = runs(third)[-1]["history"]  # all rounds, though the process was killed
    assert [row["state/digest"] for row in tracked] == [record["state/digest"] for record in rounds]
    alone = rayfed.run(planned(path)[0][2].experiment, tmp_path / "alone")
    assert rounds[-1]["state/digest"] == alone.metrics[-1]["state/digest"]
    (failed,) = [row for row in read_rows(out) if row["status"] == "failed"]
    assert "training gave values that are not finite" in failed["error"]
    assert "\n" not in failed["error"]
    assert (out / "table.txt").read_text().splitlines()[4].split()[0] == "1e+30"


@pytest.mark.slow
def test_a_killed_probe_continues_from_its_own_checkpoint(sweep_file, tmp_path: Path, here) -> None:
    """FLASC-Search, killed while the second probe trains: the first probe is not touched."""
    search = {"kind": "flasc", "rank": 1, "density": 0.5, "factor": 2, "max_rank": 2, "max_density": 0.5}
    section = {"search": search | {"rounds": 600, "final": False}, "concurrency": 1}
    path = sweep_file(section, method={"name": "flasc"}, checkpoint={"every": 5})
    complete = run_sweep(path, out=tmp_path / "complete")
    out = tmp_path / "out"
    first, second = out / "trials" / "start", out / "trials" / "start-rank"
    resume = start_and_kill(path, out, (second / "checkpoints" / "round-000605").is_dir)
    assert not (second / "summary.json").exists()
    before = files(first)
    again = resume()
    assert again.returncode == 0, again.stderr
    assert files(first) == before
    assert (second / "events.log").read_text().count("resume after round") == 2  # from the first probe, and killed
    assert decisions(out) == decisions(tmp_path / "complete")
    table = run_sweep(path, out=out, resume=True).table
    assert [row[:-3] for row in table.rows] == [row[:-3] for row in complete.table.rows]  # but for the seconds


@pytest.mark.slow
def test_workers_of_trials_always_have_room(ray_cluster, sweep_file, tmp_path: Path) -> None:
    """Two trials reserve all four CPUs: workers outside their trials' bundles would wait for ever."""
    path = sweep_file({"parameters": {"seed": {"grid": [0, 1]}}}, engine={"kind": "ray", "workers": 1})
    run_sweep(path, out=tmp_path / "out")
    assert statuses(tmp_path / "out") == {"seed=0": "done", "seed=1": "done"}
    for trial in planned(path)[0]:
        alone = rayfed.run(trial.experiment.model_copy(update={"engine": Engine(kind="local")}), tmp_path / trial.name)
        assert last_digest(trial_folder(tmp_path / "out", trial.name)) == alone.metrics[-1]["state/digest"]

    before = dict(os.environ)
    with pytest.raises(UserError, match=r"^engine.cpus_per_worker: got 1 for each of 9 workers, but Ray has 3 CPUs, b"):
        run_sweep(path, ["engine.workers=9"], out=tmp_path / "wide")
    assert dict(os.environ) == before  # Tune's loggers are off in a sweep, but not in this process
    assert not list((tmp_path / "wide").glob("trials/*"))


@pytest.mark.slow
def test_a_stopped_trial_stays_stopped(ray_cluster, sweep_file, tmp_path: Path) -> None:
    """One at a time, rungs at 2 and 4 of 6: the second is far behind at 2, the third is better than the first."""

    def write(*rates: float) -> Path:
        stop = {"kind": "asha", "grace": 2, "factor": 2}
        section = {"parameters": {"client.lr": {"grid": [*rates]}}, "stop": stop, "concurrency": 1}
        return sweep_file(section, server={"rounds": 6})

    path, out = write(0.02, 1e-6, 0.05), tmp_path / "out"
    run_sweep(path, out=out)
    assert list(statuses(out).values()) == ["done", "stopped", "done"]
    trial = planned(path)[0][1]
    row, folder = read_rows(out)[1], trial_folder(out, trial.name)
    assert (row["stopped"]["round"], row["error"]) == (2, None)
    assert [record["round"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert not (folder / "adapter").exists()
    before = files(out / "trials")

    # A further trial with a rate that learns nothing: it is compared with the earlier trials, and nothing else runs.
    result = run_sweep(write(0.02, 1e-6, 0.05, 1e-7), out=out, resume=True)
    assert list(statuses(out).values()) == ["done", "stopped", "done", "stopped"]
    assert before.items() <= files(out / "trials").items()
    assert [row.get("stopped", {}).get("round") for row in read_rows(out)] == [None, 2, None, 2]
    assert [row[-1] for row in result.table.rows] == ["", "2", "", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["optuna", "pbt"])
def test_a_killed_search_repeats_no_finished_trial(sweep_file, tmp_path: Path, kind: str) -> None:
    """Killed on Ray Tune, in the middle of trials; on the resume, finished trials stay as they are."""
    search = {"optuna": {"trials": 5, "batch": 2, "startup": 2}, "pbt": {"population": 3, "rounds": 200}}[kind]
    spaces = {"client.lr": {"loguniform": [1e-3, 1e-1]}}
    section = {"search": {"kind": kind} | search, "parameters": spaces, "concurrency": 2}
    path, out = sweep_file(section, server={"rounds": 600}, checkpoint={"every": 50}), tmp_path / "out"
    if kind == "optuna":
        resume = start_and_kill(path, out, lambda: len([*out.glob("trials/*/summary.json")]) == 2)
    else:
        resume = start_and_kill(path, out, lambda: [*out.glob("trials/*/checkpoints/round-000350")])
    before = files(out / "trials")
    ended = {file.parent.name for file in out.glob("trials/*/summary.json")}
    again = resume()
    assert again.returncode == 0, again.stderr
    assert set(statuses(out).values()) == {"done"}
    assert all(files(out / "trials")[file] == at for file, at in before.items() if file.parent.name in ended)
    assert len(statuses(out)) == {"optuna": 5, "pbt": 3}[kind]
    for name in statuses(out):
        rounds = read_metrics(out / "trials" / name / "metrics.jsonl")
        assert [record["round"] for record in rounds] == list(range(1, 601))
        if not (out / "trials" / name / "continues.json").exists():
            alone = rayfed.run(rayfed.load_config(out / "trials" / name / "config.yaml"), tmp_path / name)
            assert rounds[-1]["state/digest"] == alone.metrics[-1]["state/digest"]


@pytest.mark.slow
def test_a_trial_whose_process_dies_continues(ray_cluster, sweep_file, tmp_path: Path, monkeypatch, capsys) -> None:
    """Killed with signal 9 once, in the middle: a new process continues from the run's own checkpoint."""
    from rayfed.sweeps.on_tune import Watch

    path = sweep_file({"parameters": {"seed": {"grid": [0]}}}, server={"rounds": 300}, checkpoint={"every": 10})
    pids, shown = [], Watch.on_trial_result

    def kill_once(self, iteration, trials, trial, result, **info) -> None:
        pids.append(result["pid"])
        if result["round"] == 55 and len({*pids}) == 1:
            os.kill(result["pid"], signal.SIGKILL)
        shown(self, iteration, trials, trial, result, **info)

    monkeypatch.setattr(Watch, "on_trial_result", kill_once)
    run_sweep(path, ["tracking.console=plain"], out=tmp_path / "out")
    assert "* seed=0: its process died; it continues in a new one" in capsys.readouterr().out.splitlines()
    assert len({*pids}) == 2
    (trial,), _ = planned(path)
    rounds = read_metrics(trial_folder(tmp_path / "out", trial.name) / "metrics.jsonl")
    alone = rayfed.run(trial.experiment, tmp_path / "alone").metrics
    assert [own["state/digest"] for own in rounds] == [own["state/digest"] for own in alone]
