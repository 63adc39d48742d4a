"""`iter_rounds` and callbacks on Ray: the driver holds rounds back, and its callbacks do what they do in process."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import lowrank

import rayfed
from rayfed.config.execution import Engine, Tracking
from rayfed.engine import driver
from rayfed.errors import RunError, UserError
from rayfed.tracking import Sink

ON_RAY = ("engine.kind=ray", "engine.workers=2")


class StopsAfterTwo(rayfed.Callback):
    """Writes what it sees into a file, and ends the run after round 2."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_round(self, record: Any) -> bool:
        with self.file.open("a") as file:
            file.write(f"{record['state/digest']}\n")
        return bool(record["round"] < 2)


class Fails(rayfed.Callback):
    def on_round(self, record: Any) -> bool:
        raise ZeroDivisionError("no luck")


class HoldsALock(rayfed.Callback):
    def __init__(self) -> None:
        self.lock = threading.Lock()


def digests(result: rayfed.RunResult) -> list[str]:
    return list(result.history["state/digest"])


@pytest.mark.slow
def test_rounds_are_held_back_and_a_closed_run_is_resumed(tmp_path: Path, ray_cluster: None) -> None:
    whole = rayfed.run(lowrank(), tmp_path / "whole")
    out = tmp_path / "run"

    def written() -> int:
        return len((out / "metrics.jsonl").read_text().splitlines())

    with rayfed.iter_rounds(lowrank(*ON_RAY, "checkpoint.every=3"), out) as rounds:
        assert [next(rounds)["round"] for _ in range(2)] == [1, 2]
        time.sleep(1.5)  # more than enough for two rounds
        assert written() == 2
    assert "stopped; `--resume` continues after round 2" in (out / "events.log").read_text()
    rounds = rayfed.iter_rounds(lowrank(*ON_RAY), out, resume=True)
    assert [record["round"] for record in rounds] == [3, 4]
    assert digests(rounds.result) == digests(whole)
    assert rounds.result.summary == whole.summary


@pytest.mark.slow
def test_callbacks_in_the_driver(tmp_path: Path, ray_cluster: None) -> None:
    here = rayfed.run(lowrank(), tmp_path / "here", callbacks=[StopsAfterTwo(tmp_path / "here.txt")])
    there = rayfed.run(lowrank(*ON_RAY), tmp_path / "there", callbacks=[StopsAfterTwo(tmp_path / "there.txt")])
    assert digests(here) == digests(there) == (tmp_path / "there.txt").read_text().split()
    assert here.summary == there.summary
    with pytest.raises(RunError, match=r"^callbacks: Fails.on_round failed: ZeroDivisionError: no luck") as failure:
        rayfed.run(lowrank(*ON_RAY), tmp_path / "fails", callbacks=[Fails()])
    assert 'raise ZeroDivisionError("no luck")' in failure.value.__notes__[0]
    assert rayfed.run(lowrank(*ON_RAY), tmp_path / "fails", resume=True).rounds == 4


def test_a_callback_that_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    pattern = r"^callbacks: got 'HoldsALock', but it cannot be pickled, and on Ray it is sent to the driver \(TypeError"
    with pytest.raises(UserError, match=pattern):
        rayfed.run(lowrank(*ON_RAY), tmp_path / "run", callbacks=[HoldsALock()])


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_rounds(ray_cluster: None, tmp_path: Path) -> None:
    whole = rayfed.run(lowrank("server.rounds=5"), tmp_path / "whole")
    rayfed.run(lowrank("server.rounds=3", *ON_RAY), tmp_path / "run")
    result = rayfed.run(lowrank("server.rounds=5", *ON_RAY), tmp_path / "run", resume=True)
    assert list(result.history["state/chain"]) == list(whole.history["state/chain"])


def test_what_happens_in_mid_round_is_out_before_the_round_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = threading.Event()

    def rounds(plan: Any, executor: Any, out: Path, sinks: Any, *_: Any) -> Any:
        sinks.start("info")
        sinks.event("in mid-round")
        assert seen.wait(20), "the round cannot end before its event is out"
        yield {"round": 1}
        sinks.event("at the end")
        raise RunError("cannot go on")

    monkeypatch.setattr(driver, "run_rounds", rounds)
    monkeypatch.setattr(driver, "RayExecutor", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(driver, "open_sinks", lambda settings, out, console: console)
    monkeypatch.setattr(driver, "RayMetrics", lambda *_: Sink())
    monkeypatch.setattr(driver.ray, "put", lambda value: value)
    plan: Any = SimpleNamespace(name="a run", engine=Engine(), tracking=Tracking(wandb="off"))
    messages = driver.Driver().run(plan, None, tmp_path, False, None, pickle.dumps(()), False)
    assert [next(messages) for _ in range(2)] == [("start", ("info",)), ("event", ("in mid-round",))]
    seen.set()
    assert [next(messages)[0] for _ in range(2)] == ["round", "event"]
    with pytest.raises(RunError, match="cannot go on"):
        next(messages)
