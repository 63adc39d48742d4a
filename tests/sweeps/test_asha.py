"""Early stopping: at the rungs, for good, and never counted as finished."""

from __future__ import annotations

from pathlib import Path

from sweep_files import planned

from rayfed.config.search import AshaSettings
from rayfed.config.sweep import Sweep, load_sweep
from rayfed.sweeps.schedulers import asha
from rayfed.sweeps.search import TrialList
from rayfed.sweeps.sweep import run_sweep
from rayfed.sweeps.table import make_table, trial_row
from rayfed.sweeps.trainable import load_federation, run_trial
from rayfed.sweeps.trial import outcome_file, record_outcome, trial_folder
from rayfed.tracking import read_metrics

GRID = {"seed": {"grid": [0, 1]}}


def test_tune_gets_the_section() -> None:
    rule = AshaSettings(kind="asha", grace=3, factor=2, brackets=2)
    scheduler = asha(rule, Sweep(parameters=GRID, metric="eval/gap", mode="min", stop=rule), 24)
    assert (scheduler.metric, scheduler._time_attr, scheduler._metric_op) == ("eval/gap", "round", -1.0)
    rungs = [sorted(milestone for milestone, _ in bracket._rungs) for bracket in scheduler._brackets]
    assert rungs == [[3, 6, 12, 24], [6, 12, 24]]


def test_what_tune_hears_of_earlier_trials(sweep_file, tmp_path: Path) -> None:
    """On a resume it gets all trials: the rounds of one that ended come from the disk, and nothing runs again."""
    path = sweep_file({"parameters": GRID, "stop": {"kind": "asha", "grace": 1, "factor": 2}}, server={"rounds": 5})
    (trial, other), federations = planned(path)

    def told() -> list[int]:
        records: list[int] = []
        run_trial(trial, tmp_path, federations[trial.data], tell=lambda record: records.append(record["round"]))
        return records

    assert told() == [1, 2, 3, 4, 5]
    before = outcome_file(tmp_path, trial).stat().st_mtime_ns
    assert told() == [1, 2, 3, 4, 5]
    assert outcome_file(tmp_path, trial).stat().st_mtime_ns == before
    record_outcome(tmp_path, trial, "stopped", round=3)
    assert told() == [1, 2, 3]

    search = TrialList(*load_sweep(path), tmp_path)
    assert [own.name for own in search.tuner()["search_alg"].waiting] == [trial.name, other.name]
    search.stop = None
    assert [own.name for own in search.tuner()["search_alg"].waiting] == [other.name]


def test_a_stopped_trial_does_not_count_as_finished(sweep_file, tmp_path: Path, here) -> None:
    parameters = {"client.lr": {"grid": [0.02, 0.05]}, "seed": {"grid": [0, 1]}}
    section = {"parameters": parameters, "tune": ["client.lr"], "stop": {"kind": "asha", "grace": 1}}
    path, out = sweep_file(section), tmp_path / "out"
    _, sweep = load_sweep(path)
    trials, _ = planned(path)
    for trial in trials:
        run_trial(trial, out, load_federation(trial.experiment, {}))
    (out / "sweep.yaml").write_text("")
    record_outcome(out, trials[3], "stopped", round=2)
    line = trial_row(out, trials[3], sweep)
    second = read_metrics(trial_folder(out, trials[3]) / "metrics.jsonl")[1]
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
