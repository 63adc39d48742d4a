"""The fan, the event log, what the package opens, and what importing it costs."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rayfed.config.execution import Tracking
from rayfed.tracking import (
    ConsoleSink,
    EventSink,
    Fan,
    JsonlSink,
    Record,
    RunInfo,
    Table,
    WandbSink,
    open_console,
    open_sinks,
    read_metrics,
)


class Witness:
    """A sink that writes down what it was told, in a list it may share."""

    def __init__(self, name: str, heard: list[tuple[str, ...]], fail: str = "") -> None:
        self.name, self.heard, self.fail = name, heard, fail

    def _hear(self, what: str) -> None:
        self.heard.append((self.name, what))
        if what == self.fail:
            raise OSError(f"{self.name} cannot {what}")

    def start(self, info: RunInfo) -> None:
        self._hear("start")

    def round(self, record: Record) -> None:
        self._hear(f"round {record['round']}")

    def event(self, text: str) -> None:
        self._hear(text)

    def finish(self, summary: Record, table: Table | None) -> None:
        self._hear("finish")

    def close(self) -> None:
        self._hear("close")


def info(out: Path, start: int = 0) -> RunInfo:
    return RunInfo("run", out, "0123456789abcdef", {"seed": 1}, rounds=2, start=start, facts={"population": 7})


def test_fan_passes_everything_on_in_order(tmp_path: Path) -> None:
    heard: list[tuple[str, ...]] = []
    fan = Fan(Witness("a", heard), Witness("b", heard))
    fan.start(info(tmp_path))
    fan.round({"round": 1})
    fan.event("oh")
    fan.finish({}, None)
    fan.close()
    assert heard == [(n, w) for w in ("start", "round 1", "oh", "finish", "close") for n in "ab"]


def test_fan_closes_all_and_raises_the_first_failure() -> None:
    heard: list[tuple[str, ...]] = []
    fan = Fan(Witness("a", heard), Witness("b", heard, fail="close"), Witness("c", heard, fail="close"))
    with pytest.raises(OSError, match="b cannot close"):
        fan.close()
    assert heard == [("a", "close"), ("b", "close"), ("c", "close")]


def test_a_table_with_a_ragged_row_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        Table("t", ("a", "b"), (("1", "2"), ("3",)))


def test_events_are_stamped_lines_in_the_order_they_happened(tmp_path: Path) -> None:
    sink = EventSink(tmp_path / "logs" / "events.log")
    sink.start(info(tmp_path))
    sink.event("a worker died:\n  out of memory\n")
    sink.finish({"test/accuracy": 0.5, "eval/loss": None}, None)
    sink.close()
    sink.close()
    lines = [line.split(" ", 1) for line in sink.path.read_text().splitlines()]
    assert [text for _, text in lines] == [
        "start: name run, digest 0123456789abcdef, rounds 2, population 7",
        "a worker died: | out of memory",
        "finish: test/accuracy 0.5",
    ]
    for stamp, _ in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
        assert abs(datetime.fromisoformat(stamp) - datetime.now(UTC)) < timedelta(minutes=1)


def test_event_log_continues_on_resume_and_mends_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    first = EventSink(path)
    first.start(info(tmp_path))
    first.close()
    with path.open("a") as file:
        file.write("2026-01-01T00:0")
    EventSink(path).start(info(tmp_path, start=1))
    texts = [line.partition(" ")[2] for line in path.read_text().splitlines()]
    assert len(texts) == 4
    assert texts[1] == "stopped before the end"
    assert texts[3].startswith("resume after round 1: ")


def test_open_sinks_writes_metrics_and_events_and_leaves_wandb_off(tmp_path: Path) -> None:
    fan = open_sinks(Tracking(wandb="off"), tmp_path / "run")
    assert [type(sink) for sink in fan.sinks] == [JsonlSink, EventSink]
    fan.start(info(tmp_path / "run"))
    fan.round({"round": 1, "train/loss": 2.0})
    fan.finish({}, None)
    fan.close()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"round": 1, "train/loss": 2.0}]
    assert len((tmp_path / "run" / "events.log").read_text().splitlines()) == 2


def test_open_sinks_has_wandb_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fan = open_sinks(Tracking(), tmp_path)
    assert [type(sink) for sink in fan.sinks] == [JsonlSink, EventSink, WandbSink]
    fan.close()


def test_open_console_follows_the_setting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for mode in ("off", "plain"):
        sink = open_console(Tracking(console=mode))
        assert isinstance(sink, ConsoleSink)
        sink.start(info(tmp_path))
        sink.close()
        assert bool(capsys.readouterr().out) == (mode == "plain")


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, rayfed.tracking as t, pathlib\n"
        "from rayfed.tracking import ConsoleSink\n"
        "ConsoleSink('plain'); t.EventSink(pathlib.Path('x')); t.JsonlSink(pathlib.Path('y'))\n"
        "print([m for m in ('wandb', 'torch', 'ray', 'rich', 'pydantic', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
