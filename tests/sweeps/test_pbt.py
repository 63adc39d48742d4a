"""Population Based Training: what Tune gets, what a member's directory says, and a population on Ray Tune itself."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import PopulationBasedTraining
from sweep_files import decisions, files, statuses

import rayfed
from rayfed.config.search import PbtSettings
from rayfed.config.sweep import Sweep, load_sweep
from rayfed.errors import UserError
from rayfed.sweeps.pbt import Generations, Population, _within
from rayfed.sweeps.plan import draw
from rayfed.sweeps.sweep import run_sweep
from rayfed.tracking import read_metrics

SEARCH = {"kind": "pbt", "population": 4, "rounds": 2}
SPACES = {"client.lr": {"loguniform": [1e-3, 2e-1]}}
SERVER = {"rounds": 6, "cohort": 2}


@pytest.fixture
def pbt_file(sweep_file) -> Callable[..., Path]:
    def write(spaces: Any = SPACES, server: Any = SERVER, **more: Any) -> Path:
        return sweep_file({"search": SEARCH | more, "parameters": spaces}, server=server)

    return write


def test_the_first_settings_are_the_draws_of_a_random_sweep(pbt_file, tmp_path: Path) -> None:
    members = Population(*load_sweep(pbt_file(), ["seed=3", "checkpoint.every=3"]), tmp_path).trials
    assert [*members] == ["m01", "m02", "m03", "m04"]
    for i, member in enumerate(members.values()):
        assert member.overrides == {"client.lr": draw(SPACES["client.lr"], "client.lr", 3, i)}
        assert member.experiment.checkpoint.every == 1  # so that every generation ends with a checkpoint
        assert member.experiment.client.schedule.kind == "constant"


def test_numbers_stay_within_their_range() -> None:
    spaces = {"client.lr": {"loguniform": [1e-3, 1e-1]}, "client.steps": {"choice": [1, 2]}}
    assert _within(spaces, {"name": "m01", "client.lr": 0.12, "client.steps": 2})["client.lr"] == 0.1
    assert _within(spaces, {"client.lr": 8e-4, "client.steps": 2}) == {"client.lr": 0.001, "client.steps": 2}
    assert _within(spaces, {"client.lr": 0.0123456789, "client.steps": 2})["client.lr"] == 0.0123457


class Trial(SimpleNamespace):
    """A trial of Tune; equal to itself alone."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Controller:
    """What the scheduler sees of Tune: trials, of which some are paused."""

    def __init__(self, count: int, done: int = 0) -> None:
        rule = PbtSettings(kind="pbt", population=count, rounds=2)
        sweep = Sweep(parameters=SPACES, metric="eval/gap", mode="min", search=rule)
        self.scheduler = Generations(rule, sweep, 6, 0, done)
        self.search_alg = None
        kept = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.trials = [
            Trial(
                config={"client.lr": 0.01}, evaluated_params={}, status="RUNNING", experiment_tag=str(i),
                run_metadata=SimpleNamespace(checkpoint_manager=kept), is_finished=lambda: False,
            )
            for i in range(count)
        ]  # fmt: skip
        self.copied: list[list[int]] = []
        self.scheduler._checkpoint_or_exploit = self.decide  # type: ignore[method-assign]
        for trial in self.trials:
            self.scheduler.on_trial_add(self, trial)

    def get_trials(self) -> list[Any]:
        return self.trials

    get_live_trials = get_trials

    def decide(self, trial: Any, controller: Any, best: list[Any], worst: list[Any]) -> None:
        if trial in worst:
            self.copied.append([self.trials.index(trial), *map(self.trials.index, best)])

    def report(self, member: int, round: int, **metrics: float) -> str:
        trial = self.trials[member]
        decision = self.scheduler.on_trial_result(self, trial, {"round": round} | metrics)
        if decision == "PAUSE":
            trial.status = "PAUSED"
        return decision


def gap(value: float) -> dict[str, float]:
    return {"eval/gap": value}


def test_members_wait_for_each_other() -> None:
    tune = Controller(3)
    assert tune.report(0, 1, **gap(0.5)) == "CONTINUE"
    assert tune.report(0, 2, **gap(0.5)) == "PAUSE"
    assert tune.report(1, 2, **gap(0.9)) == "PAUSE"
    assert tune.copied == []
    assert tune.report(2, 2, **gap(0.1)) == "PAUSE"
    assert tune.copied == [[1, 2]]  # the worst copies the best
    assert [tune.report(member, 6, **gap(0.1)) for member in range(3)] == ["CONTINUE"] * 3  # after the last, nothing


def test_a_member_that_fails_keeps_nobody_waiting() -> None:
    tune = Controller(3)
    tune.report(0, 2, **gap(0.5))
    tune.report(1, 2, **gap(0.9))
    assert tune.report(2, 1, failed=1.0) == "CONTINUE"
    tune.scheduler.on_trial_complete(tune, tune.trials[2], {})
    assert tune.copied == [[1, 0]]


def test_choices_are_keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the seed, the round and the member; the random numbers of the process stay as they are."""
    found: list[float] = []
    monkeypatch.setattr(
        PopulationBasedTraining, "_checkpoint_or_exploit", lambda self, trial, *rest: found.append(random.random())
    )
    scheduler = Controller(2).scheduler
    before = random.getstate()
    for trial, done in (("m01", 2), ("m02", 2), ("m01", 4), ("m01", 2)):
        scheduler._next_perturbation_sync = done
        Generations._checkpoint_or_exploit(scheduler, trial, None, [], [])
    assert random.getstate() == before
    assert found[0] == found[3]
    assert len({*found}) == 3
    rate = scheduler._hyperparam_mutations["client.lr"]
    random.seed(1)
    first = rate()
    random.seed(1)
    assert rate() == first
    assert 1e-3 <= first <= 2e-1


def test_a_resumed_population_goes_on_at_the_generation_that_all_have_reached() -> None:
    tune = Controller(2, done=2)
    assert tune.report(0, 2, **gap(0.5)) == "CONTINUE"  # told again; compared before
    assert tune.report(0, 4, **gap(0.5)) == "PAUSE"


def test_what_a_population_is_refused_for(tiny, tmp_path: Path) -> None:
    config = tiny("eval.every=2", "server.rounds=6").model_dump(mode="json", exclude_unset=True)
    search = {"kind": "pbt", "rounds": 3}
    with pytest.raises(UserError, match=r"^eval.every: got 2, but it should divide sweep.search.rounds=3: members are"):
        Population(config, Sweep(parameters=SPACES, search=search), tmp_path)


def test_a_population_on_ray_tune(ray_cluster, pbt_file, tmp_path: Path) -> None:
    """A member that copies nobody has the bits of a run of its own; what others copied is in their directories."""
    path, out = pbt_file(server={"rounds": 4, "cohort": 2}, population=2), tmp_path / "out"
    result = run_sweep(path, out=out)
    assert statuses(out) == {"m01": "done", "m02": "done"}
    assert "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS" not in os.environ
    members = decisions(out)
    best = min(members, key=lambda line: line["metric"])["trial"]
    copies = [line for line in members if len(line["schedule"]) == 2]
    assert len(copies) == 1
    for line in members:
        rounds = read_metrics(out / "trials" / line["trial"] / "metrics.jsonl")
        assert [own["round"] for own in rounds] == [1, 2, 3, 4]
        assert rayfed.load_config(out / "trials" / line["trial"] / "config.yaml").name == line["trial"]
        first, *later = line["schedule"]
        if later:
            source = read_metrics(out / "trials" / first["trial"] / "metrics.jsonl")
            assert [own["state/digest"] for own in rounds[:2]] == [own["state/digest"] for own in source[:2]]
            assert (first["rounds"], later[0]["rounds"], later[0]["trial"]) == ([1, 2], [3, 4], line["trial"])
            assert first["client.lr"] != later[0]["client.lr"]
        else:
            config = rayfed.load_config(out / "trials" / line["trial"] / "config.yaml")
            assert config.client.lr == first["client.lr"]
            alone = rayfed.run(config, tmp_path / line["trial"])
            assert [own["state/digest"] for own in rounds] == [own["state/digest"] for own in alone.metrics]
    assert [row[0] for row in result.table.rows if row[-1] == "best"] == [best]

    before = files(out / "trials")
    again = run_sweep(out / "sweep.yaml", out=out, resume=True)
    assert (again.rows, again.table) == (result.rows, result.table)
    assert files(out / "trials") == before
    with pytest.raises(UserError, match=r"^--resume: .*m01 was made with other settings"):
        run_sweep(path, ["server.cohort=3"], out=out, resume=True)
    assert not (out / "tune").exists()
