"""Optuna over real runs: means over seeds, no point runs twice, and a resumed search repeats no finished trial."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_files import decisions, files

from rayfed.config.sweep import Sweep, load_sweep
from rayfed.errors import UserError
from rayfed.sweeps import on_tune
from rayfed.sweeps.optuna_search import OptunaPoints
from rayfed.sweeps.plan import corners
from rayfed.sweeps.sweep import run_sweep
from rayfed.tracking import read_metrics
from rayfed.tracking.console import PlainView
from rayfed.tracking.trials import TrialsView

SEARCH = {"kind": "optuna", "trials": 7, "batch": 3, "startup": 3}
SPACES = {"client.lr": {"loguniform": [1e-3, 1e-1]}, "lora.rank": {"choice": [1, 2]}}


@pytest.fixture
def optuna_file(sweep_file) -> Callable[..., Path]:
    def write(parameters: Any = SPACES, cases: Any = None, **more: Any) -> Path:
        return sweep_file({"search": SEARCH | more, "parameters": parameters, "cases": cases})

    return write


def test_a_search_from_its_first_point_to_its_best(optuna_file, tmp_path: Path, here, monkeypatch) -> None:
    path, out = optuna_file(), tmp_path / "out"
    result = run_sweep(path, out=out)
    (ran,) = here.ran
    assert [line["trial"] for line in result.rows] == ran
    metric = {line["trial"]: line["metric"] for line in result.rows}
    points = decisions(out)
    assert len(points) == 7
    for point in points:
        (name,) = point["trials"]
        rate, rank = point["settings"]["client.lr"], point["settings"]["lora.rank"]
        assert name == f"lr={rate:g},rank={rank}"
        assert point["values"] == {"eval/gap": metric[name]}
    best = min(points, key=lambda point: point["values"]["eval/gap"])
    (marked,) = (row for row in result.table.rows if row[-1] == "best")
    assert marked[:2] == (f"{best['settings']['client.lr']:g}", str(best["settings"]["lora.rank"]))

    # Finished trials need no Ray, and the recorded file is the sweep again.
    before = files(out / "trials")
    monkeypatch.setitem(sys.modules, "rayfed.sweeps.on_tune", None)
    again = run_sweep(out / "sweep.yaml", out=out, resume=True)
    assert (again.rows, again.table, decisions(out)) == (result.rows, result.table, points)
    assert files(out / "trials") == before


def test_points_depend_on_results(optuna_file, tmp_path: Path, here) -> None:
    """One after the other, equal results give equal points; the opposite aim gives others."""
    path = optuna_file(batch=1, trials=5)
    for name, mode in (("a", "min"), ("b", "min"), ("c", "max")):
        run_sweep(path, [f"sweep.mode={mode}"], out=tmp_path / name)
    assert here.ran[0] == here.ran[1]
    assert here.ran[0][:3] == here.ran[2][:3]  # random at first
    assert here.ran[0][3:] != here.ran[2][3:]


@pytest.mark.parametrize("sampler", ["nsga2", "random"])
def test_other_samplers(optuna_file, tmp_path: Path, here, sampler: str) -> None:
    path = optuna_file(sampler=sampler, against="bytes/total", startup=10, trials=4)
    assert len(run_sweep(path, out=tmp_path / "out").table.rows) == 4


@pytest.mark.parametrize("against", [None, "bytes/up"])
def test_an_interrupted_search_repeats_no_finished_trial(
    optuna_file, tmp_path: Path, here, monkeypatch, against
) -> None:
    """Interrupted in its first and in its fourth trial: the open points come first, then new ones, `trials` in all."""
    run = on_tune.run_trial
    path = optuna_file(SPACES | {"seed": {"grid": [0, 1]}}, trials=4, batch=2, against=against)
    for done in (0, 3):
        out, started = tmp_path / str(done), []

        def interrupted(experiment, *rest, started=started, done=done, **more):
            started.append(experiment.name)
            if len(started) > done:
                raise KeyboardInterrupt
            return run(experiment, *rest, **more)

        monkeypatch.setattr(on_tune, "run_trial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(path, out=out)
        monkeypatch.setattr(on_tune, "run_trial", run)
        known = [name for point in decisions(out) for name in point["trials"]]
        assert started == known[: done + 1]
        before = {name: files(out / "trials" / name) for name in started[:done]}
        here.ran.clear()
        result = run_sweep(path, out=out, resume=True)
        (ran,) = here.ran
        assert ran[: len(known) - done] == known[done:]
        assert len(ran) == 8 - done
        assert before == {name: files(out / "trials" / name) for name in started[:done]}
        assert all(point["values"] for point in decisions(out))
        assert not result.failed


def test_optuna_knows_the_values_of_earlier_points(optuna_file, tmp_path: Path, here) -> None:
    path, out = optuna_file(SPACES, {"a": {}, "b": {"lora.alpha": 1.0}}), tmp_path / "out"
    run_sweep(path, ["sweep.search.trials=5"], out=out)
    settings, sweep = load_sweep(path)
    points = OptunaPoints(settings, sweep, out)
    assert not points.complete()
    trials = points.study.trials
    assert [trial.values for trial in trials] == [[point["values"]["eval/gap"]] for point in decisions(out)[:5]]
    assert [trial.params for trial in trials] == [point["params"] for point in decisions(out)[:5]]
    run_sweep(path, out=out, resume=True)
    assert [len(stage) for stage in here.ran] == [5, 2]


def test_a_failed_trial_runs_again(optuna_file, tmp_path: Path, here, monkeypatch) -> None:
    path, out, run = optuna_file(), tmp_path / "out", on_tune.run_trial
    run_sweep(path, ["sweep.search.trials=2"], out=tmp_path / "first")
    wrong = here.ran.pop()[1]

    def fails(experiment, *rest, **more):
        if experiment.name == wrong:
            raise MemoryError("out of memory")
        return run(experiment, *rest, **more)

    monkeypatch.setattr(on_tune, "run_trial", fails)
    result = run_sweep(path, out=out)
    assert [line["trial"] for line in result.failed] == [wrong]
    assert [point["trials"] for point in decisions(out) if point["values"] is None] == [[wrong]]
    monkeypatch.setattr(on_tune, "run_trial", run)
    result = run_sweep(path, out=out, resume=True)
    assert here.ran[1:] == [[wrong]]
    assert not result.failed
    assert all(point["values"] for point in decisions(out))
    assert result.table.rows[1][-2] == "1/1"


def test_seeds_cases_and_bytes(optuna_file, tmp_path: Path, here) -> None:
    """The values of a point are means over its seeds; the second one is a sum over all rounds."""
    cases = {"plain": {"method.name": "fedit"}, "sparse": {"method.name": "flasc", "wire.up.density": 0.25}}
    path = optuna_file(SPACES | {"seed": {"grid": [3, 5]}}, cases, against="bytes/up")
    out = tmp_path / "out"
    result = run_sweep(path, out=out)
    lines = {line["trial"]: line for line in result.rows}
    points = decisions(out)
    for point in points:
        assert [name.rpartition(",")[2] for name in point["trials"]] == ["seed=3", "seed=5"]
        gaps = [lines[name]["metric"] for name in point["trials"]]
        sent = [
            sum(record["bytes/up"] for record in read_metrics(out / "trials" / name / "metrics.jsonl"))
            for name in point["trials"]
        ]
        assert point["values"] == {"eval/gap": sum(gaps) / 2, "bytes/up": sum(sent) / 2}
    values = [point["values"] for point in points]
    front = [
        f"{point['settings']['client.lr']:g}"
        for point in points
        if not any(o != point["values"] and all(o[key] <= point["values"][key] for key in o) for o in values)
    ]
    assert {row[1] for row in result.table.rows if "front" in row[-1]} == {*front}
    assert result.table.columns[:2] == ("case", "lr")
    assert all("bytes/up" in row[-1] for row in result.table.rows)


def test_the_runs_of_a_point_are_side_by_side_and_batch_points_are_open(optuna_file, tmp_path: Path) -> None:
    path = optuna_file(SPACES | {"seed": {"grid": [3, 5]}}, batch=2, trials=3)
    points = OptunaPoints(*load_sweep(path), tmp_path)
    points.console = TrialsView(PlainView(io.StringIO()), "eval/gap")
    configs = [points.suggest() for _ in range(5)]
    assert [config and config["seed"] for config in configs] == [3, 5, 3, 5, None]
    names = [config["name"] for config in configs if config]
    points.trial_ended(points.trials[names[0]], "no memory")
    assert points.suggest() is None  # the point has another run
    points.trial_ended(points.trials[names[1]], "no memory")
    last = [points.suggest() for _ in range(3)]
    assert [config and config["seed"] for config in last] == [3, 5, None]
    for name in [*names[2:], *(config["name"] for config in last if config)]:
        assert not points.complete()
        points.trial_ended(points.trials[name], "no memory")
    assert points.complete()
    assert points.suggest() is None


def test_no_point_runs_twice(optuna_file, tmp_path: Path, here) -> None:
    path = optuna_file({"lora.rank": {"choice": [1, 2]}})
    result = run_sweep(path, out=tmp_path / "out")
    assert [sorted(stage) for stage in here.ran] == [["rank=1", "rank=2"]]
    assert len(result.rows) == len(result.table.rows) == 2
    points = decisions(tmp_path / "out")
    assert len(points) == 7
    metric = {row["trial"]: row["metric"] for row in result.rows}
    for point in points:
        (name,) = point["trials"]
        assert point["values"] == {"eval/gap": metric[name]}
    run_sweep(path, out=tmp_path / "out", resume=True)
    assert decisions(tmp_path / "out") == points


def test_a_directory_of_other_points_is_refused(optuna_file, tmp_path: Path, here) -> None:
    path, out = optuna_file(trials=2), tmp_path / "out"
    run_sweep(path, out=out)
    for now in "null", "{choice: [4, 3]}", "{choice: [1]}":
        with pytest.raises(UserError, match=r"^--resume: .*search.jsonl has client.lr=.*rank=.*, but the resumed"):
            run_sweep(path, [f"sweep.parameters.lora.rank={now}"], out=out, resume=True)
    with pytest.raises(UserError, match=r"^--resume: .*rank=.* was made with other settings"):
        run_sweep(path, ["client.steps=3"], out=out, resume=True)
    (out / "search.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"^--resume: .*search.jsonl is damaged"):
        run_sweep(path, out=out, resume=True)


def test_the_search_in_configs_is_valid(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("rayfed.sweeps.plan.check_trials", lambda *_: {})  # without data and model
    path = Path(__file__).parents[2] / "configs" / "sweeps" / "optuna_accuracy_bytes.yaml"
    search = OptunaPoints(*load_sweep(path), tmp_path)
    assert len(search.checked) == 3 * 2**3  # every rank at both ends of the three ranges


def test_a_refused_point_counts_as_failed(sweep_file, tmp_path: Path, here, monkeypatch) -> None:
    """If there are very many combinations, not all are checked before the start."""
    monkeypatch.setattr("rayfed.sweeps.plan.MAX_CORNERS", 1)
    spaces = {"server.cohort": {"choice": [2, 4]}, "partition.clients": {"choice": [6, 3]}}
    path, out = sweep_file({"search": SEARCH, "parameters": spaces}), tmp_path / "out"
    result = run_sweep(path, out=out)
    assert not result.failed
    points = decisions(out)
    wrong = [point for point in points if point["settings"] == {"server.cohort": 4, "partition.clients": 3}]
    assert wrong
    assert wrong[0]["refused"].startswith("server.cohort: got 4, but the population has only 3 clients")
    assert all(point["values"] is None and not point["trials"] for point in wrong)
    assert all(point["values"] for point in points if point not in wrong)
    run_sweep(path, out=out, resume=True)
    assert decisions(out) == points


def test_of_very_many_combinations_each_value_is_checked_once() -> None:
    spaces = {f"a{i}": {"choice": [1, 2, 3]} for i in range(7)}
    search = {"kind": "optuna", "trials": 1}
    found = [dict(point.overrides) for point in corners(Sweep(parameters=spaces, search=search), {"b": 5})]
    assert len(found) == 1 + 2 * 7
    first = dict.fromkeys(spaces, 1) | {"b": 5}
    assert found[0] == first
    assert {(key, one[key]) for one in found for key in spaces} == {(key, v) for key in spaces for v in (1, 2, 3)}
    assert all(sum(one[key] != first[key] for key in first) == 1 for one in found[1:])
