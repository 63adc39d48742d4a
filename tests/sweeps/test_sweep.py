"""Trials run once, continue from their checkpoints, and do not depend on other trials."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sweep_files import planned, run_in_process, statuses

import rayfed
from rayfed.config.marks import data_key
from rayfed.config.sweep import load_sweep
from rayfed.errors import RunError, UserError, class_and_line
from rayfed.run_directory import locked
from rayfed.sweeps.plan import trial_folder
from rayfed.sweeps.sweep import run_sweep
from rayfed.sweeps.table import trial_row
from rayfed.tracking import read_metrics


def test_trials_that_are_done_need_no_ray(sweep_file, tmp_path: Path, monkeypatch, capsys) -> None:
    path, out = sweep_file({"parameters": {"seed": {"grid": [0, 1]}}}), tmp_path / "out"
    trials, _ = planned(path)
    for trial in trials:
        assert run_in_process(trial, out) == ""
    (out / "sweep.yaml").write_text("")
    monkeypatch.setitem(sys.modules, "rayfed.sweeps.on_tune", None)
    result = run_sweep(path, ["tracking.console=plain"], out=out, resume=True)
    assert [line["status"] for line in result.rows] == ["done", "done"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("2/2")

    # The recorded file is the sweep again.
    assert run_sweep(out / "sweep.yaml", out=out, resume=True).rows == result.rows

    # A sweep may get more trials, but earlier trials must not change.
    grown = sweep_file({"parameters": {"seed": {"grid": [0, 1, 2]}}})
    with pytest.raises(ImportError):  # there is something to run
        run_sweep(grown, out=out, resume=True)
    with pytest.raises(UserError, match=r"^--resume: .*seed=0 was made with other settings \(digest "):
        run_sweep(path, ["server.rounds=5"], out=out, resume=True)


def test_the_other_seeds_run_only_the_selected_values(sweep_file, tmp_path: Path, here, capsys) -> None:
    parameters = {"client.lr": {"grid": [1e-6, 0.05, 1e30]}, "seed": {"grid": [0, 1, 2, 3]}}
    section = {"parameters": parameters, "tune": ["client.lr"], "tune_seeds": 2}
    path, out = sweep_file(section), tmp_path / "out"
    result = run_sweep(path, ["tracking.console=plain"], out=out)
    assert here.ran == [
        [f"lr={lr},seed={seed}" for lr in ("1e-06", "0.05", "1e+30") for seed in (0, 1)],
        ["lr=0.05,seed=2", "lr=0.05,seed=3"],
    ]
    status = {line["trial"]: line["status"] for line in result.rows}
    assert statuses(out) == status
    assert [name for name, found in status.items() if found == "done"] == [*here.ran[0][:4], *here.ran[1]]
    assert [name for name, found in status.items() if found == "failed"] == here.ran[0][4:]
    assert set(status.values()) == {"done", "failed", "not selected"}
    assert result.failed == [line for line in result.rows if line["status"] == "failed"]
    (row,) = result.table.rows
    assert (row[0], row[-1]) == ("0.05", "4/4")
    mean = sum(line["metric"] for line in result.rows if "lr=0.05" in line["trial"]) / 4
    assert row[1].startswith(f"{100 * mean:.2f} ±")
    assert "of the first 2 seeds" in result.table.title
    assert "selected: 4 trials of 12, 2 to run" in capsys.readouterr().out

    run_sweep(path, out=out, resume=True)
    assert here.ran[2:] == [here.ran[0][4:]]  # the failed ones are tried again, nothing else


def test_a_trial_is_a_run_of_its_own(sweep_file, tmp_path: Path) -> None:
    path = sweep_file({"parameters": {"seed": {"grid": [3]}}})
    (trial,), _ = planned(path)
    run_in_process(trial, tmp_path)
    alone = rayfed.run(trial.experiment, tmp_path / "alone")
    mine = read_metrics(trial_folder(tmp_path, trial.name) / "metrics.jsonl")
    assert [r["state/digest"] for r in mine] == [r["state/digest"] for r in alone.metrics]
    assert trial_row(tmp_path, trial, load_sweep(path)[1])["summary"]["final/gap"] == alone.summary["final/gap"]
    assert trial.experiment.name == "seed=3"
    assert trial.experiment.tracking.group == "tiny"


def test_federations_are_shared_by_trials_with_the_same_data(sweep_file, tmp_path: Path, monkeypatch) -> None:
    trials, federations = planned(
        sweep_file({"parameters": {"client.lr": {"grid": [0.1, 0.2]}, "seed": {"grid": [0, 1]}}})
    )
    keys = [data_key(trial.experiment.model_dump(mode="json")) for trial in trials]
    assert keys == keys[:2] * 2
    assert set(federations) == set(keys)
    assert len(federations) == 2
    monkeypatch.setattr("rayfed.tasks.known_answer.problem.make_problem", None)  # the data are not loaded again
    assert run_in_process(trials[0], tmp_path, federations[keys[0]]) == ""


@pytest.mark.parametrize("left", [".config.yaml.1.partial", "config.yaml"])
def test_a_trial_that_was_killed_at_its_start_starts_again(sweep_file, tmp_path: Path, left: str) -> None:
    (trial,), _ = planned(sweep_file({"parameters": {"seed": {"grid": [0]}}}))
    folder = trial_folder(tmp_path, trial.name)
    (folder / "checkpoints").mkdir(parents=True)
    from rayfed.config import dump_config

    (folder / left).write_text(dump_config(trial.experiment))
    assert run_in_process(trial, tmp_path) == ""
    assert (folder / "summary.json").is_file()


def test_whatever_a_trial_raises_is_recorded_in_one_line(sweep_file, tmp_path: Path, monkeypatch, here) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("\n  out of memory:\n details")

    monkeypatch.setattr("rayfed.api.continuation.iter_rounds", fail)
    (row,) = run_sweep(sweep_file({"parameters": {"seed": {"grid": [0]}}}), out=tmp_path / "out").failed
    assert (row["status"], row["error"]) == ("failed", "MemoryError: out of memory:")
    assert class_and_line(RunError("a\nb")) == "a"
    assert class_and_line(ValueError()) == "ValueError: ValueError"


def test_a_damaged_record_is_one_line(sweep_file, tmp_path: Path) -> None:
    path, out = sweep_file({"parameters": {"seed": {"grid": [0]}}}), tmp_path / "out"
    for file in "sweep.jsonl", "trials/seed=0/summary.json":
        (out / file).parent.mkdir(parents=True)
        (out / "sweep.yaml").write_text("")
        (out / file).write_text('{"status": ')
        with pytest.raises(UserError, match=rf"^--resume: .*{file} is damaged \(.*\); choose another --out$"):
            run_sweep(path, out=out, resume=True)
        shutil.rmtree(out)


def test_a_sweep_has_one_process_at_a_time(sweep_file, tmp_path: Path) -> None:
    path, out = sweep_file({"parameters": {"seed": {"grid": [0]}}}), tmp_path / "out"
    with ThreadPoolExecutor(1) as other, locked(out):
        error = other.submit(run_sweep, path, out=out).exception()
    assert isinstance(error, UserError)
    assert str(error) == f"--out: got {str(out)!r}, but another process is using it"


def test_ctrl_c_leaves_a_sweep_that_can_be_resumed(sweep_file, tmp_path: Path, monkeypatch, capsys) -> None:
    from rayfed.cli import main

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt  # raised, not sent: a test process may be deaf to signals

    monkeypatch.setattr("rayfed.sweeps.on_tune.run_on_tune", interrupted)
    path, out = sweep_file({"parameters": {"seed": {"grid": [0]}}}), tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out)]) == 1
    assert capsys.readouterr().err == "rayfed: interrupted; `--resume` with the same --out continues\n"
    assert statuses(out) == {"seed=0": "unfinished"}
