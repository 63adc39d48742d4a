"""Early stopping: at the rungs worked out by hand, for good, and never counted as finished."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rayfed.config.search import AshaSettings
from rayfed.config.sweep import Sweep, load_sweep
from rayfed.sweeps.asha import ResumableASHA, build_scheduler, compared_rounds
from rayfed.sweeps.plan import Trial, plan_trials
from rayfed.sweeps.sweep import run_sweep
from rayfed.sweeps.table import make_table, trial_row
from rayfed.sweeps.process import run_trial
from rayfed.sweeps.trial import outcome_file, record_outcome, trial_folder
from rayfed.tracking import read_metrics

GRID = {"seed": {"grid": [0, 1]}}


def halving(grace: int = 2, factor: int = 2, rounds: int = 9, mode: str = "min") -> ResumableASHA:
    rule = AshaSettings(kind="asha", grace=grace, factor=factor)
    return ResumableASHA(rule, Sweep(parameters=GRID, metric="eval/gap", mode=mode, stop=rule), rounds)


def play(scheduler: ResumableASHA, name: str, values: dict[int, float], id: str = "") -> int | None:
    """The round after which a trial that shows these values by round is stopped."""
    trial = SimpleNamespace(trial_id=id or f"id of {name}", config={"trial": name})
    scheduler.on_trial_add(None, trial)
    for round, value in values.items():
        if scheduler.on_trial_result(None, trial, {"round": round, "eval/gap": value}) == "STOP":
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
def test_which_trials_continue(mode: str, sign: int) -> None:
    """Rungs at 2, 4 and 8. A trial continues if it is no worse than the median of the trials before it."""
    scheduler = halving(mode=mode)

    def values(**by_round: float) -> dict[int, float]:
        return {int(round[1:]): sign * value for round, value in by_round.items()}

    assert play(scheduler, "a", values(r1=9, r2=5, r4=3, r8=2)) is None  # no trial before it
    assert play(scheduler, "b", values(r1=9, r2=6)) == 2
    assert play(scheduler, "c", values(r1=99, r2=5.2, r3=9, r4=3.5)) == 4  # 5.2 is under the median of 5 and 6
    assert play(scheduler, "d", values(r1=1, r2=1, r4=1, r8=1)) is None


def test_a_rung_is_reached_at_the_first_measured_round() -> None:
    scheduler = halving()
    assert play(scheduler, "a", {3: 5.0, 6: 3.0}) is None
    assert play(scheduler, "b", {3: 6.0}) == 3
    assert play(scheduler, "c", {3: 4.0, 6: 3.5}) == 6
    assert play(scheduler, "d", {5: 1.0, 7: 50.0}) is None  # past the rung that it skipped


def test_a_resumed_sweep_compares_with_earlier_results() -> None:
    scheduler = halving()
    scheduler.replay("a", [{"round": r, "eval/gap": g} for r, g in ((1, 9.0), (2, 5.0), (3, None), (4, 3.0))])
    scheduler.replay("b", [{"round": 2, "eval/gap": 6.0}])
    assert play(scheduler, "c", {2: 5.8}) == 2
    # Trial a continues from its checkpoint under a new id of Tune, and is not compared with itself.
    assert play(scheduler, "a", {4: 3.0, 5: 9.0, 8: 2.0}, id="new") is None
    assert play(scheduler, "d", {2: 1.0, 4: 3.1}) == 4


def planned(path: Path) -> tuple[list[Trial], dict, Sweep]:
    settings, sweep = load_sweep(path)
    return *plan_trials(settings, sweep), sweep


def test_the_rounds_about_which_a_scheduler_has_decided(sweep_file, tmp_path: Path) -> None:
    rule = {"kind": "asha", "grace": 1, "factor": 2}
    path = sweep_file({"parameters": GRID, "stop": rule}, server={"rounds": 5}, checkpoint={"every": 2, "keep": 9})
    (trial, other), federations, sweep = planned(path)
    assert compared_rounds(tmp_path, trial) == []
    run_trial(trial, tmp_path, federations[trial.data])

    def rounds() -> list[int]:
        return [record["round"] for record in compared_rounds(tmp_path, trial)]

    assert rounds() == [1, 2, 3, 4]  # the last round is no rung
    outcome_file(tmp_path, trial).unlink()
    (trial_folder(tmp_path, trial) / "checkpoints" / "round-000005").rename(tmp_path / "away")
    assert rounds() == [
        1,
        2,
        3,
        4,
    ]  # killed in round 5: the checkpoint of round 4 proves that the trial was allowed to continue
    record_outcome(tmp_path, trial, "stopped", round=3)
    assert rounds() == [1, 2, 3]
    assert build_scheduler([trial, other], sweep, tmp_path) is not None
    assert build_scheduler([trial], sweep.model_copy(update={"stop": None}), tmp_path) is None


def test_a_stopped_trial_does_not_count_as_finished(sweep_file, tmp_path: Path, here) -> None:
    parameters = {"client.lr": {"grid": [0.02, 0.05]}, "seed": {"grid": [0, 1]}}
    section = {"parameters": parameters, "tune": ["client.lr"], "stop": {"kind": "asha", "grace": 1}}
    path, out = sweep_file(section), tmp_path / "out"
    trials, federations, sweep = planned(path)
    for trial in trials:
        run_trial(trial, out, federations[trial.data])
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
