"""What the console shows of running trials."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from rayfed.sweeps.sweep import Progress
from rayfed.tracking.console import PlainView


def trial(name: str, rounds: int = 9) -> Any:
    return SimpleNamespace(name=name, experiment=SimpleNamespace(server=SimpleNamespace(rounds=rounds)))


def record(round: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {"round": round, "time/round_s": seconds, "bytes/total": 1_500_000 * round} | more


@pytest.fixture
def progress() -> Progress:
    """Two running trials: one has done two of nine rounds, the other none."""
    shown = Progress(PlainView(io.StringIO()), "eval/accuracy")
    shown.start(trial("a"))
    shown.start(trial("b"))
    shown.round("a", record(1, 10.0, **{"eval/accuracy": 0.5}))
    shown.round("a", record(2, 12.0))
    shown.round("unknown", record(2, 12.0))
    return shown


def test_the_table_of_running_trials(progress: Progress) -> None:
    table = progress.table(3, 8)
    assert table.title == "3 of 8 trials have ended"
    assert table.rows == (
        ("a", "2/9", "50.00 %", "3.00", "1:17"),  # the median of 10 and 12 s, seven times
        ("b", "0/9", "-", "-", "-"),
    )
    progress.start(trial("a"))  # after a pause
    assert progress.table(3, 8) == table


def test_lines_come_at_once_and_then_from_time_to_time(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress.show(0, 2)
    lines = progress.view._stream.getvalue().splitlines()
    assert lines == [
        "* 0 of 2 trials have ended",
        "*   a: round 2/9, eval/accuracy 50.00 %, 3.00 MB, eta 1:17",
        "*   b: round 0/9, eval/accuracy -, - MB, eta -",
    ]
    progress.show(0, 2)
    assert len(progress.view._stream.getvalue().splitlines()) == 3
    now += 30
    progress.show(0, 2)
    assert len(progress.view._stream.getvalue().splitlines()) == 6


def test_a_terminal_has_a_table(progress: Progress) -> None:
    screen = io.StringIO()
    progress.live = Live(console=Console(file=screen, force_terminal=True, width=80), auto_refresh=False)
    with progress.live:
        progress.show(0, 2)
    assert re.search(r"a +│ +2/9 +│ +50.00 % +│ +3.00 +│ +1:17", screen.getvalue())
    assert progress.view._stream.getvalue() == ""


def test_a_trial_that_ended_is_a_line(progress: Progress) -> None:
    done = {"trial": "a", "status": "done", "error": None, "metric": 0.7, "bytes": 2e6, "seconds": 40.0}
    progress.end(done, 1, 3)
    progress.end({"trial": "b", "status": "failed", "error": "no memory"}, 2, 3)
    progress.end({"trial": "c", "status": "stopped", "error": None, "stopped": {"round": 3, "metric": 0.1}}, 3, 3)
    assert progress.view._stream.getvalue().splitlines() == [
        "* [1/3] done a: eval/accuracy 70.00 %, 2.00 MB, 40.0 s",
        "* [2/3] failed b: no memory",
        "* [3/3] stopped c: after round 3 (eval/accuracy 10.00 %)",
    ]
    assert progress.table(3, 3).rows == ()
