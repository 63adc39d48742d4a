"""What the console shows of running trials."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from rayfed.tracking.console import PlainView
from rayfed.tracking.trials import TrialsView


def record(round: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {"round": round, "time/round_s": seconds, "bytes/total": 1_500_000 * round} | more


@pytest.fixture
def console() -> TrialsView:
    """Two running trials: one has done two of nine rounds, the other none."""
    shown = TrialsView(PlainView(io.StringIO()), "eval/accuracy")
    shown.start("a", 9)
    shown.start("b", 9)
    shown.round("a", record(1, 10.0, **{"eval/accuracy": 0.5}))
    shown.round("a", record(2, 12.0))
    shown.round("unknown", record(2, 12.0))
    return shown


def test_the_table_of_running_trials(console: TrialsView) -> None:
    table = console.table(3, 8)
    assert table.title == "3 of 8 trials have ended"
    assert table.rows == (
        ("a", "2/9", "50.00 %", "3.00", "1:17"),  # the median of 10 and 12 s, seven times
        ("b", "0/9", "-", "-", "-"),
    )
    console.start("a", 9)  # after a pause
    assert console.table(3, 8) == table


def test_lines_come_at_once_and_then_from_time_to_time(console: TrialsView, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console.show(0, 2)
    lines = console.view._stream.getvalue().splitlines()
    assert lines == [
        "* 0 of 2 trials have ended",
        "*   a: round 2/9, eval/accuracy 50.00 %, 3.00 MB, eta 1:17",
        "*   b: round 0/9, eval/accuracy -, - MB, eta -",
    ]
    console.show(0, 2)
    assert len(console.view._stream.getvalue().splitlines()) == 3
    now += 30
    console.show(0, 2)
    assert len(console.view._stream.getvalue().splitlines()) == 6


def test_a_terminal_has_a_table(console: TrialsView) -> None:
    screen = io.StringIO()
    console.live = Live(console=Console(file=screen, force_terminal=True, width=80), auto_refresh=False)
    with console.live:
        console.show(0, 2)
    assert re.search(r"a +│ +2/9 +│ +50.00 % +│ +3.00 +│ +1:17", screen.getvalue())
    assert console.view._stream.getvalue() == ""


def test_a_trial_that_ended_is_a_line(console: TrialsView) -> None:
    done = {"trial": "a", "status": "done", "error": None, "metric": 0.7, "bytes": 2e6, "seconds": 40.0}
    console.end(done, 1, 3)
    console.end({"trial": "b", "status": "failed", "error": "no memory"}, 2, 3)
    console.end({"trial": "c", "status": "stopped", "error": None, "stopped": {"round": 3, "metric": 0.1}}, 3, 3)
    assert console.view._stream.getvalue().splitlines() == [
        "* [1/3] done a: eval/accuracy 70.00 %, 2.00 MB, 40.0 s",
        "* [2/3] failed b: no memory",
        "* [3/3] stopped c: after round 3 (eval/accuracy 10.00 %)",
    ]
    assert console.table(3, 3).rows == ()
