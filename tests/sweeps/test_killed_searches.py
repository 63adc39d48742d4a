"""A killed search repeats no finished trial when it is resumed, and comes to the same decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweep_files import decisions, files

from rayfed.sweeps import trial as trials
from rayfed.sweeps.sweep import run_sweep

SEARCHES: dict[str, dict[str, Any]] = {  # the section `search`
    "flasc": {"rank": 1, "density": 0.5, "factor": 2, "max_rank": 2, "rounds": 2},
    "optuna": {"trials": 5, "batch": 2, "startup": 2},
    "pbt": {"population": 3, "rounds": 2},
}


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_killed_search_continues(sweep_file, tmp_path: Path, here, monkeypatch, kind: str) -> None:
    """Killed at each of its first trials in turn: in the middle of a stage, and between two stages."""
    parameters = {} if kind == "flasc" else {"client.lr": {"loguniform": [1e-3, 1e-1]}}
    section = {"search": {"kind": kind, **SEARCHES[kind]}, "parameters": parameters}
    path = sweep_file(section, method={"name": "flasc"})
    complete = run_sweep(path, out=tmp_path / "complete")
    ran = [name for stage in here.ran for name in stage]
    assert len(here.ran) > 1
    run = trials.run
    for done in range(4):
        out, started = tmp_path / str(done), []

        def killed(experiment, *rest, started=started, done=done, **more):
            started.append(experiment.name)
            if len(started) > done:
                raise KeyboardInterrupt
            return run(experiment, *rest, **more)

        monkeypatch.setattr(trials, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(path, out=out)
        monkeypatch.setattr(trials, "run", run)
        assert started == ran[: done + 1]
        before = {name: files(out / "trials" / name) for name in ran[:done]}
        here.ran.clear()
        result = run_sweep(path, out=out, resume=True)
        assert [name for stage in here.ran for name in stage] == ran[done:]
        assert before == {name: files(out / "trials" / name) for name in ran[:done]}
        assert decisions(out) == decisions(tmp_path / "complete")
        assert [row["metric"] for row in result.rows] == [row["metric"] for row in complete.rows]
