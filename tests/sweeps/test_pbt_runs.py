"""Population Based Training over real runs: exact continuation, decisions by the metrics, no trial runs twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sweep_files import decisions, files

import rayfed
from rayfed.config import validate
from rayfed.config.search import PbtSettings
from rayfed.config.sweep import load_sweep
from rayfed.errors import UserError
from rayfed.sweeps.pbt import PbtSearch, explore
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


def last(out: Path, name: str) -> dict[str, Any]:
    return read_metrics(out / "trials" / name / "metrics.jsonl")[-1]


def test_without_copies_a_member_is_the_unbroken_run(pbt_file, tiny_settings, tmp_path: Path, here) -> None:
    """Three generations of two rounds are six rounds, to the bit: model, moments of the server's optimizer, bytes."""
    server = SERVER | {"optimizer": "adamw", "lr": 0.01}
    out = tmp_path / "out"
    run_sweep(pbt_file(server=server, quantile=0.0, population=2), out=out)
    for member in decisions(out)[0]["members"]:
        name = member["trial"].replace("g01", "g03")
        settings = tiny_settings | {"server": server} | {"client": tiny_settings["client"] | lr(member)}
        whole = rayfed.run(validate(settings), tmp_path / name).metrics
        ours = read_metrics(out / "trials" / name / "metrics.jsonl")
        assert len(ours) == 6
        for key in ("state/digest", "bytes/total", "eval/gap"):
            assert [record[key] for record in ours] == [record[key] for record in whole]


def lr(member: dict[str, Any]) -> dict[str, float]:
    return {"lr": member["settings"]["client.lr"]}


def test_a_search_from_its_first_generation_to_its_best_member(pbt_file, tmp_path: Path, here, monkeypatch) -> None:
    path, out = pbt_file(), tmp_path / "out"
    result = run_sweep(path, out=out)
    assert here.ran == [[f"g0{g}-m0{m}" for m in range(1, 5)] for g in (1, 2, 3)]
    *generations, end = decisions(out)
    for before, after in pairwise(generations):
        metrics = {member["trial"]: member["metric"] for member in before["members"]}
        assert metrics == {name: last(out, name)["eval/gap"] for name in metrics}
        worst, best = max(metrics, key=metrics.__getitem__), min(metrics, key=metrics.__getitem__)
        settings = {member["trial"]: member["settings"] for member in before["members"]}
        for member, own in zip(after["members"], metrics, strict=True):
            number, generation = int(own[-2:]), after["generation"]
            assert member["from"] == (best if own == worst else own)
            copied = explore(settings[best], PbtSettings(**SEARCH), SPACES, 0, generation, number)
            assert member["settings"] == (copied if own == worst else settings[own])
            note = json.loads((out / "trials" / member["trial"] / "continues.json").read_text())
            assert note["trial"] == member["from"]
            assert note["state/digest"] == last(out, member["from"])["state/digest"]
    metrics = {member["trial"]: member["metric"] for member in generations[-1]["members"]}
    assert (end["best"], end["metric"]) == min(metrics.items(), key=lambda pair: pair[1])
    assert (end["rounds"], end["client_rounds"]) == (24, 48)
    assert [part["rounds"] for part in end["schedule"]] == [[1, 2], [3, 4], [5, 6]]
    for part, generation in zip(end["schedule"], generations, strict=True):
        (member,) = [one for one in generation["members"] if one["trial"] == part["trial"]]
        assert part["client.lr"] == member["settings"]["client.lr"]
    for part, later in pairwise(end["schedule"]):
        assert json.loads((out / "trials" / later["trial"] / "continues.json").read_text())["trial"] == part["trial"]
    assert [row[0] for row in result.table.rows] == [f"g03-m0{m}" for m in range(1, 5)]
    assert [row[0] for row in result.table.rows if row[-1] == "best"] == [end["best"]]

    before = files(out / "trials")
    monkeypatch.setitem(sys.modules, "rayfed.sweeps.on_tune", None)
    again = run_sweep(out / "sweep.yaml", out=out, resume=True)
    assert (again.rows, again.table, decisions(out)) == (result.rows, result.table, [*generations, end])
    assert files(out / "trials") == before


def test_a_failed_member_copies_and_changes_nothing_later(pbt_file, tmp_path: Path, here, monkeypatch) -> None:
    from rayfed.sweeps import trial as trials

    path, out, run = pbt_file(quantile=0.0), tmp_path / "out", trials.run

    def fails(experiment, *rest, **more):
        if experiment.name == "g01-m02":
            raise MemoryError("out of memory")
        return run(experiment, *rest, **more)

    monkeypatch.setattr(trials, "run", fails)
    result = run_sweep(path, out=out)
    assert [line["trial"] for line in result.failed] == ["g01-m02"]
    metrics = {member["trial"]: member["metric"] for member in decisions(out)[0]["members"]}
    assert metrics.pop("g01-m02") is None
    assert decisions(out)[1]["members"][1]["from"] == min(metrics, key=metrics.__getitem__)
    said = decisions(out)
    here.ran.clear()
    monkeypatch.setattr(trials, "run", run)
    assert not run_sweep(path, out=out, resume=True).failed
    assert here.ran == [["g01-m02"]]
    assert decisions(out) == said


def test_further_generations_of_the_same_search(pbt_file, tmp_path: Path, here) -> None:
    path, out = pbt_file(), tmp_path / "out"
    run_sweep(path, ["server.rounds=4"], out=out)
    run_sweep(path, out=out, resume=True)
    assert [stage[0] for stage in here.ran] == ["g01-m01", "g02-m01", "g03-m01"]
    run_sweep(path, out=tmp_path / "whole")
    assert decisions(out) == decisions(tmp_path / "whole")


def test_a_directory_of_another_population_is_refused(pbt_file, tmp_path: Path, here) -> None:
    path, out = pbt_file(), tmp_path / "out"
    run_sweep(path, ["server.rounds=4"], out=out)
    for generation, other in (
        (1, "sweep.search.population=5"),
        (1, "seed=1"),
        (2, "sweep.search.quantile=0.5"),
    ):
        with pytest.raises(UserError, match=rf"^--resume: .*has members of generation {generation}, but the resumed"):
            run_sweep(path, [other], out=out, resume=True)
    with pytest.raises(UserError, match=r"^--resume: .*has values of eval/gap, but .* compares eval/loss; resume"):
        run_sweep(path, ["sweep.metric=eval/loss"], out=out, resume=True)


def test_the_population_in_configs_is_valid(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("rayfed.sweeps.pbt.check_trials", lambda *_: {})  # without data and model
    path = Path(__file__).parents[2] / "configs" / "sweeps" / "pbt.yaml"
    at = PbtSearch(*load_sweep(path), tmp_path).state()
    assert [trial.name for trial in at.pending] == [f"g01-m0{m}" for m in range(1, 7)]
    assert at.stage == "generation 1 of 4"
