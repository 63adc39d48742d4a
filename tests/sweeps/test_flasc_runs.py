"""FLASC-Search over real runs: probes continue from checkpoints, no trial runs twice, decisions are recorded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_files import decisions, files, folded_width, read_rows

import rayfed
from rayfed.config import load_config
from rayfed.sweeps import on_tune
from rayfed.sweeps.sweep import run_sweep
from rayfed.tracking import read_metrics

SEARCH = {"kind": "flasc", "rank": 1, "density": 0.5, "factor": 2, "max_rank": 4, "rounds": 2}
FLASC: dict[str, Any] = {
    "method": {"name": "flasc"},
    "server": {"rounds": 5, "cohort": 2, "optimizer": "adamw", "lr": 0.05},
    "client": {"schedule": {"kind": "linear", "final": 0.2}},
}


@pytest.fixture
def search_file(sweep_file) -> Callable[..., Path]:
    return lambda **more: sweep_file({"search": SEARCH | more}, **FLASC)


def test_a_search_from_its_first_probe_to_its_final_run(search_file, tmp_path: Path, here, capsys) -> None:
    path, out = search_file(), tmp_path / "out"
    result = run_sweep(path, ["tracking.console=plain"], out=out)
    (ran,) = here.ran
    assert ran[:3] == ["start", "start-rank", "start-density"]
    assert not result.failed
    metric = {line["trial"]: line["metric"] for line in result.rows}
    *probes, last = decisions(out)
    assert {probe["trial"]: probe["metric"] for probe in probes} == metric
    chosen, count = "start", 1
    while step := {name: metric[name] for name in metric if name.rpartition("-")[0] == chosen}:
        best = min(step, key=step.__getitem__)
        if step[best] >= metric[chosen]:
            break
        chosen, count = best, count + 1
    assert [probe["trial"] for probe in probes if probe["chosen"]][-1] == chosen
    assert sum(probe["chosen"] for probe in probes) == count
    assert ran[-1] == f"final-{chosen}"
    assert [*metric] == ran
    rounds = 2 * (len(ran) - 1) + 5
    assert (last["rounds"], last["client_rounds"]) == (rounds, 2 * rounds)

    # A probe continues its parent's run; the final run is an ordinary run, with the file's own schedule.
    parent, child = (out / "trials" / name for name in ("start", "start-rank"))
    assert read_metrics(child / "metrics.jsonl")[:2] == read_metrics(parent / "metrics.jsonl")
    assert json.loads((child / "continues.json").read_text())["trial"] == "start"
    probe, final = (load_config(out / "trials" / name / "config.yaml") for name in ("start-rank", f"final-{chosen}"))
    assert (probe.lora.rank, probe.server.rounds, probe.client.schedule.kind) == (2, 4, "constant")
    assert (final.server.rounds, final.client.schedule.kind) == (5, "linear")
    assert (final.lora.rank, final.wire.up.density) == (probes[-1]["rank"], probes[-1]["up"])
    alone = rayfed.run(final, tmp_path / "alone").metrics[-1]["state/digest"]
    assert read_metrics(out / "trials" / f"final-{chosen}" / "metrics.jsonl")[-1]["state/digest"] == alone

    assert folded_width(result.table) <= 80 - len("  test/accuracy")  # a sweep that reports this has one column more
    rows = [[row[0], row[-1]] for row in result.table.rows]
    assert rows[0] == ["0 start", "chosen"]
    assert rows[-1] == ["final", ""]
    assert sum(state == "chosen" for _, state in rows) == count
    assert f"chosen: rank {final.lora.rank}, densities" in result.table.title
    said = capsys.readouterr().out
    assert "* [1/1] done start: eval/gap" in said
    assert f"FLASC-Search: chosen: rank {final.lora.rank}, densities" in said


def test_a_search_that_is_done_needs_no_ray(search_file, tmp_path: Path, here, monkeypatch) -> None:
    path, out = search_file(), tmp_path / "out"
    first = run_sweep(path, out=out)
    before, said = files(out / "trials"), decisions(out)
    monkeypatch.setitem(sys.modules, "rayfed.sweeps.on_tune", None)
    again = run_sweep(out / "sweep.yaml", out=out, resume=True)  # the file that is left is the sweep again
    assert (again.rows, again.table, decisions(out)) == (first.rows, first.table, said)
    assert files(out / "trials") == before


def test_a_probe_killed_during_its_warm_start_starts_again(search_file, tmp_path: Path, here, monkeypatch) -> None:
    path, out = search_file(max_rank=2), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("rayfed.api.warm_start.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_sweep(path, out=out)
    assert (out / "trials" / "start-rank" / "checkpoints").is_dir()
    assert not (out / "trials" / "start-rank" / "config.yaml").exists()
    assert not run_sweep(path, out=out, resume=True).failed


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the trials that fail."""
    names: set[str] = set()
    rounds = on_tune.run_trial

    def fails(experiment: rayfed.Experiment, *rest: Any, **more: Any) -> Iterator[Any]:
        if experiment.name in names:
            raise MemoryError("out of memory")
        yield from rounds(experiment, *rest, **more)

    monkeypatch.setattr(on_tune, "run_trial", fails)
    return names


def test_failed_probes_lose_and_are_tried_again_on_resume(search_file, tmp_path: Path, here, failing) -> None:
    """Also one to which the resumed search comes only after another one has run again."""
    path, out = search_file(max_rank=2), tmp_path / "out"
    failing |= {"start-density", "start-rank-density"}
    result = run_sweep(path, out=out)
    assert {line["trial"] for line in result.failed} == failing
    found = {probe["trial"]: (probe["metric"], probe["chosen"]) for probe in decisions(out)[:-1]}
    assert (found["start-density"], found["start-rank"][1]) == ((None, False), True)
    failing.clear()
    assert not run_sweep(path, out=out, resume=True).failed
    assert here.ran[0][:2] == ["start", "start-rank"]
    assert here.ran[1][0] == "start-density"
    whole = run_sweep(path, out=tmp_path / "whole")
    assert decisions(out) == decisions(tmp_path / "whole")
    assert [row["digest"] for row in whole.rows] == [line["digest"] for line in read_rows(out)]


def test_killed_between_two_probes_it_comes_to_the_same_decisions(
    search_file, tmp_path: Path, here, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = search_file(max_rank=2), tmp_path / "out"
    whole = run_sweep(path, out=tmp_path / "whole")
    trials = [row["trial"] for row in whole.rows]
    for name in trials[1], trials[3]:
        with monkeypatch.context() as patch:
            patch.setattr(on_tune, "run_trial", interrupted(on_tune.run_trial, name))
            with pytest.raises(KeyboardInterrupt):
                run_sweep(path, out=out, resume=out.is_dir())
    before = files(out / "trials" / trials[0])
    result = run_sweep(path, out=out, resume=True)
    assert files(out / "trials" / trials[0]) == before
    assert decisions(out) == decisions(tmp_path / "whole")
    assert [row["digest"] for row in result.rows] == [row["digest"] for row in whole.rows]


def interrupted(rounds: Callable[..., Iterator[Any]], name: str) -> Callable[..., Iterator[Any]]:
    """``rounds``, in which the trial of that name is killed after a round."""

    def run(experiment: rayfed.Experiment, *rest: Any, **more: Any) -> Iterator[Any]:
        for record in rounds(experiment, *rest, **more):
            yield record
            if experiment.name == name:
                raise KeyboardInterrupt

    return run


def test_without_a_final_run_the_search_ends_with_its_probes(search_file, tmp_path: Path, here) -> None:
    run_sweep(search_file(final=False, budget=6), out=tmp_path / "out")
    assert here.ran == [["start", "start-rank", "start-density"]]
    last = decisions(tmp_path / "out")[-1]
    assert last["rounds"] == 6
