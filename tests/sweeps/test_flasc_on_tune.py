"""FLASC-Search as the search algorithm of a `tune.Tuner`: from its first probe to its final run, interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from small_runs import LOWRANK

import rayfed
from rayfed.config import validate
from rayfed.sweeps.flasc_search import FlascSearch
from rayfed.sweeps.sweep import run_sweep
from rayfed.tracking import read_metrics

SEARCH: dict[str, Any] = {"rank": 1, "density": 0.5, "factor": 2, "max_rank": 2, "rounds": 2}
SECTIONS: dict[str, Any] = {"method": {"name": "flasc"}, "server": {"rounds": 5, "cohort": 2}}


class Interrupt(tune.Callback):
    """Ends the tuner after three trials, once in this process."""

    done = False

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not Interrupt.done and sum(trial.status == "TERMINATED" for trial in trials) >= 3:
            Interrupt.done = True
            raise RuntimeError("interrupted")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_tuner_finds_what_the_sweep_finds(
    tmp_path: Path, sweep_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")  # Tune saves its state after every step
    experiment = validate({**LOWRANK, **SECTIONS})
    search = FlascSearch(experiment, "eval/gap", "min", **SEARCH)
    folders = tune.RunConfig(name="flasc", storage_path=str(tmp_path), verbose=0, callbacks=[Interrupt()])
    tuner = rayfed.tune.tuner(experiment, {}, tune.TuneConfig(search_alg=search), folders)
    with pytest.raises(RuntimeError, match="interrupted"):
        tuner.fit()
    results = tune.Tuner.restore(str(tmp_path / "flasc"), rayfed.tune.trainable(experiment)).fit()
    assert not results.errors
    found = {result.config["name"]: result.metrics["state/digest"] for result in results}
    assert len(found) == len(results)  # no probe twice

    sweep = run_sweep(sweep_file({"search": {"kind": "flasc", **SEARCH}}, **SECTIONS), out=tmp_path / "sweep")
    states = {row["trial"]: read_metrics(sweep.out / "trials" / row["trial"] / "metrics.jsonl") for row in sweep.rows}
    assert found == {name: records[-1]["state/digest"] for name, records in states.items()}
