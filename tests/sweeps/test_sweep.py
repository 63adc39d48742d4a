"""Trials: never twice, from where they were left, whatever happens to the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from small_runs import wait_for
from wandb_files import runs

import rayfed
from rayfed.config.sweep import load_sweep
from rayfed.errors import RunError, UserError
from rayfed.sweeps.plan import Trial, plan_trials
from rayfed.sweeps.sweep import run_sweep
from rayfed.sweeps.trial import in_one_line, locked, outcome, place, record_of, work
from rayfed.tracking import SinkList, read_metrics

# 1e30 diverges in its first round.
SWEEP = {"parameters": {"client.lr": {"grid": [0.02, 1e30, 0.05, 0.1]}}, "concurrency": 1}


def planned(path: Path, *overrides: str) -> tuple[list[Trial], dict]:
    return plan_trials(*load_sweep(path, overrides))


def statuses(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    return {line["trial"]: line["status"] for line in lines}


@pytest.mark.slow
def test_a_killed_sweep_resumes_and_a_failing_trial_stops_no_other(sweep_file, tmp_path: Path) -> None:
    """kill -9 during the third trial: `--resume` leaves the first alone, continues the third, does the fourth."""
    tracking = {"wandb": "offline", "artifact": False}
    path = sweep_file(SWEEP, server={"rounds": 1200}, checkpoint={"every": 5}, tracking=tracking)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rayfed", "sweep", str(path), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["WANDB_MODE"] = "offline"
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    third = out / "trials" / "lr=0.05"
    try:
        assert wait_for(lambda: list(third.glob("checkpoints/round-*")))
    finally:
        process.kill()
        process.wait()
    assert statuses(out) == {"lr=0.02": "done", "lr=1e+30": "failed", "lr=0.05": "unfinished", "lr=0.1": "unfinished"}
    first = {file: file.stat().st_mtime_ns for file in (out / "trials" / "lr=0.02").rglob("*") if file.is_file()}

    again = subprocess.run([*command, "--resume"], env=environment, timeout=200, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("rayfed: 1 of 4 trials did not finish; --resume tries them again")
    assert statuses(out) == {"lr=0.02": "done", "lr=1e+30": "failed", "lr=0.05": "done", "lr=0.1": "done"}
    assert first == {
        file: file.stat().st_mtime_ns for file in (out / "trials" / "lr=0.02").rglob("*") if file.is_file()
    }
    assert "resume after round" in (third / "events.log").read_text()
    trials, _ = planned(path)
    rounds = read_metrics(third / "metrics.jsonl")
    assert [record["round"] for record in rounds] == list(range(1, 1201))
    tracked = runs(third)[-1]["history"]  # whole, whatever the killed process took with it
    assert [row["state/digest"] for row in tracked] == [record["state/digest"] for record in rounds]
    alone = rayfed.run(trials[2].experiment, tmp_path / "alone")
    assert rounds[-1]["state/digest"] == alone.metrics[-1]["state/digest"]
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    (failed,) = [line for line in lines if line["status"] == "failed"]
    assert "training gave values that are not finite" in failed["error"]
    assert "\n" not in failed["error"]
    assert (out / "table.txt").read_text().splitlines()[4].split()[0] == "1e+30"


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_nested_actors_always_fit(cluster, sweep_file, tmp_path: Path) -> None:
    """Two trials hold all four CPUs: workers outside their trials' bundles would wait for ever."""
    path = sweep_file({"parameters": {"seed": {"grid": [0, 1]}}}, engine={"kind": "ray", "workers": 1})
    result = run_sweep(path, out=tmp_path / "out")
    assert [line["status"] for line in result.lines] == ["done", "done"]
    for trial in planned(path)[0]:
        alone = rayfed.run(trial.experiment.model_copy(update={"engine": local()}), tmp_path / trial.name)
        assert (
            read_metrics(place(tmp_path / "out", trial) / "metrics.jsonl")[-1]["state/digest"]
            == (alone.metrics[-1]["state/digest"])
        )

    with pytest.raises(UserError, match=r"^engine.workers: got 9, so that a trial needs 10 x \(1 CPU\), which can "):
        run_sweep(path, ["engine.workers=9"], out=tmp_path / "wide")
    assert not list((tmp_path / "wide").glob("trials/*"))


def local() -> object:
    from rayfed.config.execution import Engine

    return Engine(kind="local")


def test_trials_that_are_done_need_no_ray(sweep_file, tmp_path: Path, monkeypatch, capsys) -> None:
    path, out = sweep_file({"parameters": {"seed": {"grid": [0, 1]}}}), tmp_path / "out"
    trials, federations = planned(path)
    for trial in trials:
        work(trial, out, federations[trial.data], SinkList())
        assert outcome(out, trial).status == "done"
    (out / "sweep.yaml").write_text("")
    monkeypatch.setitem(sys.modules, "rayfed.sweeps.on_tune", None)
    result = run_sweep(path, ["tracking.console=plain"], out=out, resume=True)
    assert [line["status"] for line in result.lines] == ["done", "done"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("2/2")

    # The file that is left is the sweep again.
    assert run_sweep(out / "sweep.yaml", out=out, resume=True).lines == result.lines

    # A sweep may grow, but what is there must stay what it was.
    grown = sweep_file({"parameters": {"seed": {"grid": [0, 1, 2]}}})
    with pytest.raises(ImportError):  # there is something to run
        run_sweep(grown, out=out, resume=True)
    with pytest.raises(UserError, match=r"^--resume: .*seed=0 was made with other settings \(digest "):
        run_sweep(path, ["server.rounds=5"], out=out, resume=True)


def test_only_what_the_first_seeds_choose_runs_on_the_others(sweep_file, tmp_path: Path, here, capsys) -> None:
    parameters = {"client.lr": {"grid": [1e-6, 0.05, 1e30]}, "seed": {"grid": [0, 1, 2, 3]}}
    section = {"parameters": parameters, "tune": ["client.lr"], "tune_seeds": 2}
    path, out = sweep_file(section), tmp_path / "out"
    result = run_sweep(path, ["tracking.console=plain"], out=out)
    assert here.ran == [
        [f"lr={lr},seed={seed}" for lr in ("1e-06", "0.05", "1e+30") for seed in (0, 1)],
        ["lr=0.05,seed=2", "lr=0.05,seed=3"],
    ]
    status = {line["trial"]: line["status"] for line in result.lines}
    assert statuses(out) == status
    assert [name for name, found in status.items() if found == "done"] == [*here.ran[0][:4], *here.ran[1]]
    assert [name for name, found in status.items() if found == "failed"] == here.ran[0][4:]
    assert set(status.values()) == {"done", "failed", "not chosen"}
    assert result.failed == [line for line in result.lines if line["status"] == "failed"]
    (row,) = result.table.rows
    assert (row[0], row[-1]) == ("0.05", "4/4")
    mean = sum(line["metric"] for line in result.lines if "lr=0.05" in line["trial"]) / 4
    assert row[1].startswith(f"{100 * mean:.2f} ±")
    assert "of the first 2 seeds" in result.table.title
    assert "chosen: 4 trials of 12, 2 to run" in capsys.readouterr().out

    run_sweep(path, out=out, resume=True)
    assert here.ran[2:] == [here.ran[0][4:]]  # the failed ones are tried again, nothing else


def test_a_trial_is_a_run_of_its_own(sweep_file, tmp_path: Path) -> None:
    path = sweep_file({"parameters": {"seed": {"grid": [3]}}})
    (trial,), federations = planned(path)
    work(trial, tmp_path, federations[trial.data], SinkList())
    alone = rayfed.run(trial.experiment, tmp_path / "alone")
    mine = read_metrics(place(tmp_path, trial) / "metrics.jsonl")
    assert [r["state/digest"] for r in mine] == [r["state/digest"] for r in alone.metrics]
    assert outcome(tmp_path, trial).summary["final/gap"] == alone.summary["final/gap"]
    assert trial.experiment.name == "seed=3"
    assert trial.experiment.tracking.group == "tiny"


def test_federations_are_shared_by_trials_with_the_same_data(sweep_file, tmp_path: Path, monkeypatch) -> None:
    trials, federations = planned(
        sweep_file({"parameters": {"client.lr": {"grid": [0.1, 0.2]}, "seed": {"grid": [0, 1]}}})
    )
    assert [trial.data for trial in trials] == [trials[0].data, trials[1].data] * 2
    assert set(federations) == {trials[0].data, trials[1].data}
    assert len(federations) == 2
    monkeypatch.setattr("rayfed.tasks.data.federation.form_federation", None)  # the data are not loaded again
    work(trials[0], tmp_path, federations[trials[0].data], SinkList())
    assert outcome(tmp_path, trials[0]).error is None


@pytest.mark.parametrize("left", [".config.yaml.1.partial", "config.yaml"])
def test_a_trial_that_was_killed_at_its_start_starts_again(sweep_file, tmp_path: Path, left: str) -> None:
    (trial,), federations = planned(sweep_file({"parameters": {"seed": {"grid": [0]}}}))
    folder = place(tmp_path, trial)
    (folder / "checkpoints").mkdir(parents=True)
    from rayfed.config import dump_config

    (folder / left).write_text(dump_config(trial.experiment))
    work(trial, tmp_path, federations[trial.data], SinkList())
    assert outcome(tmp_path, trial).status == "done"


def test_whatever_a_trial_raises_is_recorded_in_one_line(sweep_file, tmp_path: Path, monkeypatch) -> None:
    (trial,), federations = planned(sweep_file({"parameters": {"seed": {"grid": [0]}}}))

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("\n  out of memory:\n details")

    monkeypatch.setattr("rayfed.sweeps.trial.run", fail)
    work(trial, tmp_path, federations[trial.data], SinkList())
    ended = outcome(tmp_path, trial)
    assert (ended.status, ended.error) == ("failed", "MemoryError: out of memory:")
    assert in_one_line(RunError("a\nb")) == "a"
    assert in_one_line(ValueError()) == "ValueError: no reason given"


def test_a_damaged_record_is_one_line(sweep_file, tmp_path: Path) -> None:
    (trial,), _ = planned(sweep_file({"parameters": {"seed": {"grid": [0]}}}))
    record_of(tmp_path, trial).parent.mkdir()
    record_of(tmp_path, trial).write_text('{"status": ')
    with pytest.raises(
        UserError, match=r"^--resume: .*seed=0.json is damaged \(.*\); remove it to run the trial again"
    ):
        outcome(tmp_path, trial)


def test_a_sweep_has_one_process_at_a_time(sweep_file, tmp_path: Path) -> None:
    path, out = sweep_file({"parameters": {"seed": {"grid": [0]}}}), tmp_path / "out"
    with locked(out, ""), pytest.raises(RunError, match="is in use by another sweep"):
        run_sweep(path, out=out)


def test_ctrl_c_leaves_a_sweep_that_can_be_resumed(sweep_file, tmp_path: Path, monkeypatch, capsys) -> None:
    from rayfed.cli import main

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt  # raised, not sent: a test process may be deaf to signals

    monkeypatch.setattr("rayfed.sweeps.on_tune.run_on_tune", interrupted)
    path, out = sweep_file({"parameters": {"seed": {"grid": [0]}}}), tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out)]) == 1
    assert capsys.readouterr().err == "rayfed: interrupted; `--resume` with the same --out continues\n"
    assert statuses(out) == {"seed=0": "unfinished"}
