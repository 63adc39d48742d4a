"""Early stopping: at the rungs, for good, and never counted as finished."""

from __future__ import annotations

import io
import json
from pathlib import Path

from sweep_files import planned, run_in_process

from rayfed.config.sweep import load_sweep
from rayfed.sweeps.plan import ENDED, Trial, trial_folder
from rayfed.sweeps.search import TrialList
from rayfed.sweeps.sweep import run_sweep
from rayfed.sweeps.table import make_table, trial_row
from rayfed.tracking import read_metrics
from rayfed.tracking.console import PlainView
from rayfed.tracking.trials import TrialsView


def write_stopped(out: Path, trial: Trial, round: int) -> None:
    """sweep.jsonl says that the trial was stopped; its run has written no summary."""
    row = {"trial": trial.name, "status": "stopped", "stopped": {"round": round}}
    (out / "sweep.jsonl").write_text(json.dumps(row) + "\n")
    (trial_folder(out, trial.name) / "summary.json").unlink()


def test_what_tune_gets(sweep_file, tmp_path: Path) -> None:
    """The section; and on a resume all trials: those that have ended do not run, but their rounds are compared."""
    stop = {"kind": "asha", "grace": 3, "factor": 2, "brackets": 2}
    path = sweep_file({"parameters": {"seed": {"grid": [0, 1, 2]}}, "stop": stop}, server={"rounds": 24})
    trials, federations = planned(path)
    for trial in trials[:2]:
        run_in_process(trial, tmp_path, federations[trial.data])
    write_stopped(tmp_path, trials[1], 3)
    search = TrialList(*load_sweep(path), tmp_path)
    scheduler = search.tune_config()["scheduler"]
    assert (scheduler.metric, scheduler._time_attr, scheduler._metric_op) == ("eval/gap", "round", -1.0)
    rungs = [sorted(milestone for milestone, _ in bracket._rungs) for bracket in scheduler._brackets]
    assert rungs == [[3, 6, 12, 24], [6, 12, 24]]
    assert [search.suggest() for _ in range(4)] == [
        {"name": "seed=0", "seed": 0, ENDED: 24},
        {"name": "seed=1", "seed": 1, ENDED: 3},
        {"name": "seed=2", "seed": 2},
        None,
    ]
    search.console = TrialsView(PlainView(io.StringIO()), "eval/gap")
    search.trial_ended(trials[1], round=1)
    assert search.rows["seed=1"]["status"] == "stopped"
    assert search.rows["seed=1"]["stopped"]["round"] == 3  # as before, whenever ASHA stops it now
    search.stop = None
    assert search.tune_config() == {}
    assert [own.name for own in search.waiting] == ["seed=2"]


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
