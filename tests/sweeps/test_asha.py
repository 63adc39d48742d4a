"""Early stopping: at the rungs, for good, and never counted as finished."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from sweep_files import planned, run_in_process

from rayfed.config.sweep import load_sweep
from rayfed.sweeps.plan import Trial, trial_folder
from rayfed.sweeps.sweep import TrialList, run_sweep
from rayfed.sweeps.table import make_table, trial_row
from rayfed.tracking import read_metrics
from rayfed.tracking.console import PlainView
from rayfed.tracking.trials import TrialsView


def rounds(out: Path, trial: Trial) -> list[dict[str, Any]]:
    return read_metrics(trial_folder(out, trial.name) / "metrics.jsonl")


def write_stopped(out: Path, trial: Trial, round: int) -> None:
    """sweep.jsonl says that the trial was stopped; its run has written no summary."""
    row = {"trial": trial.name, "status": "stopped", "stopped": {"round": round}}
    (out / "sweep.jsonl").write_text(json.dumps(row) + "\n")
    (trial_folder(out, trial.name) / "summary.json").unlink()


def test_what_tune_gets(sweep_file, tmp_path: Path) -> None:
    """The section; and on a resume the missing trials, with a scheduler that knows the rounds of all others."""
    stop = {"kind": "asha", "grace": 3, "factor": 2}
    path = sweep_file({"parameters": {"seed": {"grid": [0, 1, 2]}}, "stop": stop}, server={"rounds": 24})
    trials, _ = planned(path)
    for trial in trials[:2]:
        run_in_process(trial, tmp_path)
    write_stopped(tmp_path, trials[1], 3)
    search = TrialList(*load_sweep(path), tmp_path)
    scheduler = search.tune_config()["scheduler"]
    assert (scheduler.metric, scheduler._time_attr, scheduler._metric_op) == ("eval/gap", "round", -1.0)
    gaps = [{own["round"]: -own["eval/gap"] for own in rounds(tmp_path, trial)} for trial in trials[:2]]
    (bracket,) = scheduler._brackets
    rungs = dict(bracket._rungs)
    assert [*rungs] == [24, 12, 6, 3]
    assert rungs[3] == {"seed=0": gaps[0][3], "seed=1": gaps[1][3]}
    assert rungs[24] == {"seed=0": gaps[0][24]}  # the other one was stopped after round 3, whatever its run wrote then
    assert [search.suggest() for _ in range(2)] == [{"name": "seed=2", "seed": 2}, None]
    search.stop = None
    assert search.tune_config() == {}
    assert [own.name for own in search.waiting] == ["seed=2"]


def test_a_trial_that_is_stopped(sweep_file, tmp_path: Path) -> None:
    path = sweep_file({"parameters": {"seed": {"grid": [0]}}, "stop": {"kind": "asha", "grace": 1, "brackets": 2}})
    search = TrialList(*load_sweep(path), tmp_path)
    assert [len(bracket._rungs) for bracket in search.tune_config()["scheduler"]._brackets] == [2, 1]
    run_in_process(trial := search.checked[0], tmp_path)
    (trial_folder(tmp_path, trial.name) / "summary.json").unlink()
    search.console = TrialsView(PlainView(io.StringIO()), "eval/gap")
    search.trial_ended(trial, round=1)
    assert search.rows["seed=0"]["status"] == "stopped"
    assert search.rows["seed=0"]["stopped"] == {"round": 1, "metric": rounds(tmp_path, trial)[0]["eval/gap"]}


def test_a_stopped_trial_does_not_count_as_finished(sweep_file, tmp_path: Path, here) -> None:
    parameters = {"client.lr": {"grid": [0.02, 0.05]}, "seed": {"grid": [0, 1]}}
    section = {"parameters": parameters, "tune": ["client.lr"], "stop": {"kind": "asha", "grace": 1}}
    path, out = sweep_file(section), tmp_path / "out"
    _, sweep = load_sweep(path)
    trials, _ = planned(path)
    for trial in trials:
        run_in_process(trial, out)
    (out / "sweep.yaml").write_text("")
    write_stopped(out, trials[3], 2)
    line = trial_row(out, trials[3], sweep, stopped=2)
    second = read_metrics(trial_folder(out, trials[3].name) / "metrics.jsonl")[1]
    assert (line["status"], line["stopped"]) == ("stopped", {"round": 2, "metric": second["eval/gap"]})
    assert line.get("metric") is None

    result = run_sweep(path, out=out, resume=True)
    assert here.ran == []  # a stopped trial stays stopped
    assert result.failed == []
    assert result.table.columns[-2:] == ("trials", "stopped at round")
    assert [(row[0], *row[-2:]) for row in result.table.rows] == [("0.02", "2/2", "")]  # the group with more results
    everything = make_table(trials, {row["trial"]: row for row in result.rows}, sweep.model_copy(update={"tune": ()}))
    assert [(row[0], *row[-2:]) for row in everything.rows] == [("0.02", "2/2", ""), ("0.05", "1/2", "2")]
    assert "±" not in everything.rows[1][1]
