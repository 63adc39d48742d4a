"""The list of sinks, the event log, which sinks a run opens, and what the import loads."""

from __future__ import annotations

import re
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rayfed.config.execution import Tracking
from rayfed.errors import UserError
from rayfed.tracking import (
    Record,
    RunInfo,
    Sink,
    SinkList,
    Table,
    open_console,
    open_sinks,
    read_metrics,
    tensorboard_sink,
)
from rayfed.tracking.console import ConsoleSink
from rayfed.tracking.events import EventSink
from rayfed.tracking.jsonl import JsonlSink
from rayfed.tracking.wandb_sink import WandbSink


class Recorder(Sink):
    """Appends every call to a list, which several recorders may share."""

    def __init__(self, name: str, calls: list[tuple[str, str]], fail: str = "") -> None:
        self.name, self.calls, self.fail = name, calls, fail

    def _add(self, call: str) -> None:
        self.calls.append((self.name, call))
        if call == self.fail:
            raise OSError(f"{self.name} cannot {call}")

    def start(self, info: RunInfo) -> None:
        self._add("start")

    def round(self, record: Record) -> None:
        self._add(f"round {record['round']}")

    def event(self, text: str) -> None:
        self._add(text)

    def finish(self, summary: Record, table: Table | None) -> None:
        self._add("finish")

    def close(self) -> None:
        self._add("close")


def info(out: Path, start: int = 0) -> RunInfo:
    return RunInfo("run", out, "0123456789abcdef", {"seed": 1}, rounds=2, start=start, facts={"population": 7})


def test_every_sink_gets_every_call_in_order(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []
    sinks = SinkList(Recorder("a", calls), Recorder("b", calls))
    sinks.start(info(tmp_path))
    sinks.round({"round": 1})
    sinks.event("oh")
    sinks.finish({}, None)
    sinks.close()
    assert calls == [(n, w) for w in ("start", "round 1", "oh", "finish", "close") for n in "ab"]


def test_all_sinks_are_closed_and_the_first_error_is_raised() -> None:
    calls: list[tuple[str, str]] = []
    sinks = SinkList(Recorder("a", calls), Recorder("b", calls, fail="close"), Recorder("c", calls, fail="close"))
    with pytest.raises(OSError, match="b cannot close"):
        sinks.close()
    assert calls == [("a", "close"), ("b", "close"), ("c", "close")]


def test_events_are_stamped_lines_in_the_order_they_happened(tmp_path: Path) -> None:
    sink = EventSink(tmp_path / "logs" / "events.log")
    sink.start(info(tmp_path))
    sink.event("a worker died:\n  out of memory\n")
    sink.finish({"test/accuracy": 0.5, "eval/loss": None, "test/recall": [0.5, 0.25]}, None)
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


def test_event_log_continues_on_resume_after_an_incomplete_line(tmp_path: Path) -> None:
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
    sinks = open_sinks(Tracking(wandb="off"), tmp_path / "run")
    assert [type(sink) for sink in sinks.sinks] == [JsonlSink, EventSink]
    sinks.start(info(tmp_path / "run"))
    sinks.round({"round": 1, "train/loss": 2.0})
    sinks.finish({}, None)
    sinks.close()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"round": 1, "train/loss": 2.0}]
    assert len((tmp_path / "run" / "events.log").read_text().splitlines()) == 2


def test_open_sinks_has_the_console_after_the_files_and_wandb_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    sinks = open_sinks(Tracking(), tmp_path, ConsoleSink("plain"))
    assert [type(sink) for sink in sinks.sinks] == [JsonlSink, EventSink, ConsoleSink, WandbSink]
    sinks.close()


def test_tensorboard_has_every_number_and_a_resumed_run_no_round_twice(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    def events(path: Path) -> list[Event]:
        data, found, at = path.read_bytes(), [], 0
        while at < len(data):  # TFRecord: length, its checksum, the message, its checksum
            (length,) = struct.unpack("<Q", data[at : at + 8])
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
        return found

    for start in (0, 1):
        sinks = open_sinks(Tracking(wandb="off", tensorboard=True), tmp_path)
        sinks.start(info(tmp_path, start))
        for number in range(start + 1, 3):
            sinks.round({"round": number, "train/loss": 1 / number, "eval/loss": None, "list": [1.0], "text": "x"})
        sinks.finish({}, None)
        sinks.close()
    first, second = map(events, sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.suffix))
    values = [(e.step, v.tag, v.simple_value) for e in first for v in e.summary.value]
    assert values == [(1, "round", 1), (1, "train/loss", 1), (2, "round", 2), (2, "train/loss", 0.5)]
    assert [e.step for e in second if e.session_log.status] == [2], "rounds from 2 on are dropped from the first file"


def test_without_the_package_tensorboard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard_sink, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^tracking\.tensorboard: got True, but .*pip install tensorboardX"):
        open_sinks(Tracking(wandb="off", tensorboard=True), tmp_path)


def test_open_console_follows_the_setting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for mode in ("off", "plain"):
        sink = open_console(Tracking(console=mode))
        sink.start(info(tmp_path))
        sink.round({"round": 1, "time/round_s": 0.5})
        sink.event("a worker died")
        sink.finish({"a": 1}, None)
        sink.close()
        assert bool(capsys.readouterr().out) == (mode == "plain")
