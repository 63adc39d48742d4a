"""Stopping early: at the rungs worked out by hand, for good, and never counted as finished."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from rayfed.config.search import AshaSettings
from rayfed.config.sweep import Sweep, load_sweep
from rayfed.sweeps.asha import Halving, scheduler_of, shown
from rayfed.sweeps.plan import Trial, plan_trials
from rayfed.sweeps.sweep import run_sweep
from rayfed.sweeps.table import line_of, table_of
from rayfed.sweeps.trial import outcome, place, record_of, settle_stopped, work
from rayfed.tracking import SinkList, read_metrics

GRID = {"seed": {"grid": [0, 1]}}


def halving(grace: int = 2, factor: int = 2, rounds: int = 9, mode: str = "min") -> Halving:
    rule = AshaSettings(kind="asha", grace=grace, factor=factor)
    return Halving(rule, Sweep(parameters=GRID, metric="eval/gap", mode=mode, stop=rule), rounds)


def play(scheduler: Halving, name: str, figures: dict[int, float], id: str = "") -> int | None:
    """The round after which a trial that shows these figures by round is stopped."""
    trial = SimpleNamespace(trial_id=id or f"id of {name}", config={"trial": name})
    scheduler.on_trial_add(None, trial)
    for round, figure in figures.items():
        if scheduler.on_trial_result(None, trial, {"round": round, "eval/gap": figure}) == "STOP":
            return round
        scheduler.on_trial_result(None, trial, {"round": round})  # nothing measured: nothing decided
    scheduler.on_trial_complete(None, trial, {"ended": 1})
    return None


def test_rungs() -> None:
    rule = AshaSettings(kind="asha", grace=3, factor=3)
    assert rule.rungs(28) == [3, 9, 27]
    assert rule.rungs(27) == [3, 9]  # after the last round there is nothing to stop
    assert rule.rungs(3) == []


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_who_goes_on(mode: str, sign: int) -> None:
    """Rungs at 2, 4 and 8. A trial goes on where it is no worse than the median of those before it."""
    scheduler = halving(mode=mode)

    def figures(**by_round: float) -> dict[int, float]:
        return {int(round[1:]): sign * figure for round, figure in by_round.items()}

    assert play(scheduler, "a", figures(r1=9, r2=5, r4=3, r8=2)) is None  # nobody before it
    assert play(scheduler, "b", figures(r1=9, r2=6)) == 2
    assert play(scheduler, "c", figures(r1=99, r2=5.2, r3=9, r4=3.5)) == 4  # 5.2 is under the median of 5 and 6
    assert play(scheduler, "d", figures(r1=1, r2=1, r4=1, r8=1)) is None


def test_a_rung_is_met_at_the_first_measured_round() -> None:
    scheduler = halving()
    assert play(scheduler, "a", {3: 5.0, 6: 3.0}) is None
    assert play(scheduler, "b", {3: 6.0}) == 3
    assert play(scheduler, "c", {3: 4.0, 6: 3.5}) == 6
    assert play(scheduler, "d", {5: 1.0, 7: 50.0}) is None  # the rung it skipped is behind it


def test_a_resumed_sweep_compares_with_what_was_there_before() -> None:
    scheduler = halving()
    scheduler.recall("a", [{"round": r, "eval/gap": g} for r, g in ((1, 9.0), (2, 5.0), (3, None), (4, 3.0))])
    scheduler.recall("b", [{"round": 2, "eval/gap": 6.0}])
    assert play(scheduler, "c", {2: 5.8}) == 2
    # a itself goes on from its checkpoint under another of Tune's ids, and is not compared with itself
    assert play(scheduler, "a", {4: 3.0, 5: 9.0, 8: 2.0}, id="new") is None
    assert play(scheduler, "d", {2: 1.0, 4: 3.1}) == 4


def planned(path: Path) -> tuple[list[Trial], dict, Sweep]:
    settings, sweep = load_sweep(path)
    return *plan_trials(settings, sweep), sweep


def test_what_a_directory_vouches_for(sweep_file, tmp_path: Path) -> None:
    rule = {"kind": "asha", "grace": 1, "factor": 2}
    path = sweep_file({"parameters": GRID, "stop": rule}, server={"rounds": 5}, checkpoint={"every": 2, "keep": 9})
    (trial, other), federations, sweep = planned(path)
    assert shown(tmp_path, trial) == []
    work(trial, tmp_path, federations[trial.data], SinkList())

    def rounds() -> list[int]:
        return [record["round"] for record in shown(tmp_path, trial)]

    assert rounds() == [1, 2, 3, 4]  # its last round was no rung
    record_of(tmp_path, trial).unlink()
    (place(tmp_path, trial) / "checkpoints" / "round-000005").rename(tmp_path / "away")
    assert rounds() == [1, 2, 3, 4]  # killed in round 5: the checkpoint of round 4 was written after it was let go on
    settle_stopped(tmp_path, trial, 3)
    assert rounds() == [1, 2, 3]
    assert scheduler_of([trial, other], sweep, tmp_path) is not None
    assert scheduler_of([trial], sweep.model_copy(update={"stop": None}), tmp_path) is None


def test_a_stopped_trial_is_no_finished_one(sweep_file, tmp_path: Path, here) -> None:
    parameters = {"client.lr": {"grid": [0.02, 0.05]}, "seed": {"grid": [0, 1]}}
    section = {"parameters": parameters, "tune": ["client.lr"], "stop": {"kind": "asha", "grace": 1}}
    path, out = sweep_file(section), tmp_path / "out"
    trials, federations, sweep = planned(path)
    for trial in trials:
        work(trial, out, federations[trial.data], SinkList())
    (out / "sweep.yaml").write_text("")
    settle_stopped(out, trials[3], 2)
    line = line_of(out, trials[3], sweep)
    second = read_metrics(place(out, trials[3]) / "metrics.jsonl")[1]
    assert (line["status"], line["stopped"]) == ("stopped", {"round": 2, "metric": second["eval/gap"]})
    assert line.get("metric") is None

    result = run_sweep(path, out=out, resume=True)
    assert here.ran == []  # stopped is stopped
    assert result.failed == []
    assert result.table.columns[-2:] == ("trials", "stopped at round")
    assert [(row[0], *row[-2:]) for row in result.table.rows] == [("0.02", "2/2", "")]  # more trials count
    everything = table_of(trials, result.lines, sweep.model_copy(update={"tune": ()}))
    assert [(row[0], *row[-2:]) for row in everything.rows] == [("0.02", "2/2", ""), ("0.05", "1/2", "2")]
    assert "±" not in everything.rows[1][1]


@pytest.mark.slow
def test_tune_stops_and_a_resume_does_not_revive(sweep_file, tmp_path: Path) -> None:
    """One at a time, rungs at 2 and 4 of 6: the second is far behind at 2, the third is better than the first."""
    rates = {"client.lr": {"grid": [0.02, 1e-6, 0.05]}}
    stop = {"kind": "asha", "grace": 2, "factor": 2}
    path = sweep_file({"parameters": rates, "stop": stop, "concurrency": 1}, server={"rounds": 6})
    out = tmp_path / "out"
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        result = run_sweep(path, out=out)
        assert [line["status"] for line in result.lines] == ["done", "stopped", "done"]
        trials, _, _ = planned(path)
        ended = outcome(out, trials[1])
        assert ended is not None
        assert (ended.round, ended.error) == (2, None)
        stopped = place(out, trials[1])
        assert [record["round"] for record in read_metrics(stopped / "metrics.jsonl")] == [1, 2]
        assert not (stopped / "adapter").exists()
        before = {file: file.stat().st_mtime_ns for file in (out / "trials").rglob("*") if file.is_file()}

        # Grown by a hopeless rate: compared with the trials of the first start, and nothing else runs.
        rates["client.lr"]["grid"].append(1e-7)
        grown = sweep_file({"parameters": rates, "stop": stop, "concurrency": 1}, server={"rounds": 6})
        result = run_sweep(grown, out=out, resume=True)
    finally:
        ray.shutdown()
    assert [line["status"] for line in result.lines] == ["done", "stopped", "done", "stopped"]
    assert before.items() <= {f: f.stat().st_mtime_ns for f in (out / "trials").rglob("*") if f.is_file()}.items()
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [line.get("stopped", {}).get("round") for line in lines] == [None, 2, None, 2]
    assert [row[-1] for row in result.table.rows] == ["", "2", "", "2"]
