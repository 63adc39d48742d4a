"""Optuna over real runs: batches, means over seeds, no point runs twice, and a resumed search has the same points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_files import decisions, files

from rayfed.config.sweep import Sweep, load_sweep
from rayfed.errors import UserError
from rayfed.sweeps.optuna_search import OptunaSearch
from rayfed.sweeps.space import corners
from rayfed.sweeps.sweep import run_sweep
from rayfed.tracking import read_metrics

SEARCH = {"kind": "optuna", "trials": 7, "batch": 3, "startup": 3}
SPACES = {"client.lr": {"loguniform": [1e-3, 1e-1]}, "lora.rank": {"choice": [1, 2]}}


@pytest.fixture
def optuna_file(sweep_file) -> Callable[..., Path]:
    def write(parameters: Any = SPACES, cases: Any = None, **more: Any) -> Path:
        return sweep_file({"search": SEARCH | more, "parameters": parameters, "cases": cases})

    return write


def test_a_search_from_its_first_batch_to_its_best_point(optuna_file, tmp_path: Path, here, monkeypatch) -> None:
    path, out = optuna_file(), tmp_path / "out"
    result = run_sweep(path, out=out)
    assert [len(stage) for stage in here.ran] == [3, 3, 1]
    ran = [name for stage in here.ran for name in stage]
    assert [line["trial"] for line in result.rows] == ran
    metric = {line["trial"]: line["metric"] for line in result.rows}
    *points, last = decisions(out)
    for number, point in enumerate(points, 1):
        assert point["point"] == number
        (name,) = point["trials"]
        rate, rank = point["settings"]["client.lr"], point["settings"]["lora.rank"]
        assert name == f"{number:03d},lr={rate:g},rank={rank}"
        assert point["values"] == {"eval/gap": metric[name]}
    best = min(points, key=lambda point: point["values"]["eval/gap"])
    assert (last["best"], last["settings"], last["ended"]) == (best["point"], best["settings"], "all of 7 points")
    assert [row[0] for row in result.table.rows] == [f"{n:03d}" for n in range(1, 8)]
    assert [row[0] for row in result.table.rows if row[-1] == "best"] == [f"{last['best']:03d}"]

    # Finished trials need no Ray, and the recorded file is the sweep again.
    before = files(out / "trials")
    monkeypatch.setitem(sys.modules, "rayfed.sweeps.on_tune", None)
    again = run_sweep(out / "sweep.yaml", out=out, resume=True)
    assert (again.rows, again.table, decisions(out)) == (result.rows, result.table, [*points, last])
    assert files(out / "trials") == before


def test_a_failed_trial_that_succeeds_later_changes_no_point(optuna_file, tmp_path: Path, here, monkeypatch) -> None:
    from rayfed.sweeps import trial as trials

    path, out, run = optuna_file(), tmp_path / "out", trials.run

    def fails(experiment, *rest, **more):
        if experiment.name.startswith("002"):
            raise MemoryError("out of memory")
        return run(experiment, *rest, **more)

    monkeypatch.setattr(trials, "run", fails)
    result = run_sweep(path, out=out)
    assert [line["trial"][:3] for line in result.failed] == ["002"]
    *points, _ = decisions(out)
    assert [point["point"] for point in points if point["values"] is None] == [2]
    ran = here.ran[:]
    here.ran.clear()

    def watched(*arguments, **more):
        assert len((out / "sweep.jsonl").read_text().splitlines()) == 7  # no row is missing meanwhile
        return run(*arguments, **more)

    monkeypatch.setattr(trials, "run", watched)
    result = run_sweep(path, out=out, resume=True)
    assert here.ran == [[ran[0][1]]]
    assert not result.failed
    assert decisions(out)[:-1] == points  # recorded values stay
    assert result.table.rows[1][-2] == "1/1"  # and the table has the new result
    # With the value of point 2, Optuna would have suggested other points.
    assert run_sweep(path, out=tmp_path / "other").rows[3]["trial"] != result.rows[3]["trial"]


def test_more_points_of_the_same_search(optuna_file, tmp_path: Path, here) -> None:
    path, out = optuna_file(), tmp_path / "out"
    run_sweep(path, ["sweep.search.trials=4"], out=out)
    run_sweep(path, ["sweep.search.trials=7"], out=out, resume=True)
    assert [len(stage) for stage in here.ran] == [3, 1, 2, 1]
    run_sweep(path, out=tmp_path / "whole")
    assert decisions(out) == decisions(tmp_path / "whole")


def test_seeds_cases_and_bytes(optuna_file, tmp_path: Path, here) -> None:
    """The values of a point are means over its seeds; the second one is a sum over all rounds."""
    cases = {"plain": {"method.name": "fedit"}, "sparse": {"method.name": "flasc", "wire.up.density": 0.25}}
    path = optuna_file(SPACES | {"seed": {"grid": [3, 5]}}, cases, against="bytes/up")
    out = tmp_path / "out"
    result = run_sweep(path, out=out)
    lines = {line["trial"]: line for line in result.rows}
    *points, last = decisions(out)
    for point in points:
        assert [name.rpartition(",")[2] for name in point["trials"]] == ["seed=3", "seed=5"]
        gaps = [lines[name]["metric"] for name in point["trials"]]
        sent = [
            sum(record["bytes/up"] for record in read_metrics(out / "trials" / name / "metrics.jsonl"))
            for name in point["trials"]
        ]
        assert point["values"] == {"eval/gap": sum(gaps) / 2, "bytes/up": sum(sent) / 2}
    metrics = {point["point"]: point["values"] for point in points}
    beaten = {
        n for n, own in metrics.items()
        if any(o != own and all(o[key] <= own[key] for key in own) for o in metrics.values())
    }  # fmt: skip
    assert last["front"] == [n for n in metrics if n not in beaten]
    assert [row[0] for row in result.table.rows if "front" in row[-1]] == [f"{n:03d}" for n in last["front"]]
    assert {"case", "bytes/up"} < set(result.table.columns)


def test_no_point_runs_twice(optuna_file, tmp_path: Path, here) -> None:
    path = optuna_file({"lora.rank": {"choice": [1, 2]}})
    result = run_sweep(path, out=tmp_path / "out")
    ran = [name for stage in here.ran for name in stage]
    assert sorted(name.partition(",")[2] for name in ran) == ["rank=1", "rank=2"]
    assert len(result.rows) == len(result.table.rows) == 2
    *points, _ = decisions(tmp_path / "out")
    assert len(points) == 7
    for point in points:
        first = points[point.get("same_as", point["point"]) - 1]
        assert (point["settings"], point["values"]) == (first["settings"], first["values"])
        assert bool(point["trials"]) == ("same_as" not in point)
    run_sweep(path, out=tmp_path / "out", resume=True)
    assert decisions(tmp_path / "out")[:-1] == points


def test_a_directory_of_other_points_is_refused(optuna_file, tmp_path: Path, here) -> None:
    path, out = optuna_file(), tmp_path / "out"
    run_sweep(path, out=out)
    with pytest.raises(UserError, match=r"^--resume: .*search.jsonl has client.lr=.* as point 1, but the resumed"):
        run_sweep(path, ["sweep.parameters.client.lr={loguniform: [0.001, 0.2]}"], out=out, resume=True)
    with pytest.raises(UserError, match=r"^--resume: .*search.jsonl has values of eval/gap, but .*gap and bytes"):
        run_sweep(path, ["sweep.search.against=bytes/up"], out=out, resume=True)
    (out / "search.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"^--resume: .*search.jsonl is damaged"):
        run_sweep(path, out=out, resume=True)


def test_the_search_in_configs_is_valid(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("rayfed.sweeps.optuna_search.check_trials", lambda *_: {})  # without data and model
    path = Path(__file__).parents[2] / "configs" / "sweeps" / "optuna_accuracy_bytes.yaml"
    search = OptunaSearch(*load_sweep(path), tmp_path)
    assert len(search.checked) == 3 * 2**3  # every rank at both ends of the three ranges
    assert [trial.name[:3] for trial in search.state().pending] == ["001", "002", "003", "004"]


def test_a_refused_point_counts_as_failed(sweep_file, tmp_path: Path, here, monkeypatch) -> None:
    """If there are very many combinations, not all are checked before the start."""
    monkeypatch.setattr("rayfed.sweeps.space.MAX_CORNERS", 1)
    spaces = {"server.cohort": {"choice": [2, 4]}, "partition.clients": {"choice": [6, 3]}}
    path, out = sweep_file({"search": SEARCH, "parameters": spaces}), tmp_path / "out"
    result = run_sweep(path, out=out)
    assert not result.failed
    *points, _ = decisions(out)
    wrong = [point for point in points if point["settings"] == {"server.cohort": 4, "partition.clients": 3}]
    assert wrong
    assert wrong[0]["refused"].startswith("server.cohort: got 4, but the population has only 3 clients")
    assert all(point["values"] is None and not point["trials"] for point in wrong)
    assert all(point["values"] for point in points if point not in wrong)
    run_sweep(path, out=out, resume=True)
    assert decisions(out)[:-1] == points


def test_of_very_many_combinations_each_value_is_checked_once() -> None:
    spaces = {f"a{i}": {"choice": [1, 2, 3]} for i in range(7)}
    search = {"kind": "optuna", "trials": 1}
    found = [dict(point.overrides) for point in corners(Sweep(parameters=spaces, search=search), {"b": 5})]
    assert len(found) == 1 + 2 * 7
    first = dict.fromkeys(spaces, 1) | {"b": 5}
    assert found[0] == first
    assert {(key, one[key]) for one in found for key in spaces} == {(key, v) for key in spaces for v in (1, 2, 3)}
    assert all(sum(one[key] != first[key] for key in first) == 1 for one in found[1:])
