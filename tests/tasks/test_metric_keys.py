"""The keys by which runs can be compared are keys that runs measure, and each of them holds one number."""

from __future__ import annotations

from pathlib import Path

from small_runs import LOWRANK

import rayfed
from rayfed.api import build_components
from rayfed.config import Experiment, validate


def check(experiment: Experiment, out: Path) -> tuple[str, ...]:
    task = build_components(experiment).task
    keys = task.metric_keys(experiment.eval)
    last = rayfed.run(experiment, out).metrics[-1]
    assert all(isinstance(last[key], float) for key in keys)
    return keys


def test_text(tiny, tmp_path: Path) -> None:
    sparse = ("method.name=flasc", "wire.down.density=0.5", "server.rounds=1")
    keys = check(tiny(*sparse, "eval.clients=true", "eval.unseen=true"), tmp_path / "out")
    spread = ("", "_p10", "_p50", "_p90", "_std", "_worst")
    more = {"eval/accuracy_clients", *(f"test/accuracy_clients{part}" for part in spread)}
    assert {"eval/loss", "test/accuracy_masked", "test/accuracy_unseen", *more} < set(keys)
    assert len(keys) == 2 * 2 * 3 + 8
    fewer = tiny(*sparse, "eval.masked=false")
    assert len(build_components(fewer).task.metric_keys(fewer.eval)) == 2 * 3


def test_known_answer(tmp_path: Path) -> None:
    experiment = validate(LOWRANK)
    assert check(experiment, tmp_path / "out") == ("eval/loss", "eval/gap")
    assert build_components(experiment).task.exact


def test_a_task_that_evaluates_rows_is_not_exact(tiny) -> None:
    assert not build_components(tiny()).task.exact
