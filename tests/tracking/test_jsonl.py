"""metrics.jsonl: strict JSON, complete, and after a resume the same file as without the interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import pytest

from rayfed.errors import UserError
from rayfed.tracking import Record, RunInfo, read_metrics
from rayfed.tracking.jsonl import JsonlSink


def info(out: Path, start: int = 0) -> RunInfo:
    return RunInfo("run", out, "0123456789abcdef", {}, rounds=9, start=start)


def record(number: int) -> Record:
    return {"round": number, "train/loss": 1 / number, "eval/loss": None, "state/digest": f"{number:08x}"}


def write(out: Path, rounds: range, start: int = 0) -> Path:
    sink = JsonlSink(out / "metrics.jsonl")
    sink.start(info(out, start))
    for number in rounds:
        sink.round(record(number))
    sink.close()
    return sink.path


def strict(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_reads_back_what_was_written_one_line_a_round(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 6))
    assert read_metrics(path) == [record(n) for n in range(1, 6)]
    assert path.read_text().count("\n") == 5


def test_non_finite_numbers_become_null_and_are_named(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.start(info(tmp_path))
    sink.round({"round": 1, "train/loss": float("nan"), "eval/loss": float("-inf"), "bytes/up": 3})
    sink.close()
    line = strict(sink.path.read_text())
    assert line == {
        "round": 1,
        "train/loss": None,
        "eval/loss": None,
        "bytes/up": 3,
        "nonfinite": "train/loss=nan eval/loss=-inf",
    }


def test_lists_are_read_back_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.start(info(tmp_path))
    sink.round({"round": 1, "test/recall": [0.5, None, 1.0], "test/confusion": [[3, 0], [1, 2]]})
    sink.round({"round": 2, "test/recall": [0.5, float("nan"), 1.0], "a": [[1.0, float("inf")]]})
    sink.close()
    for line in sink.path.read_text().splitlines():
        strict(line)
    assert read_metrics(sink.path) == [
        {"round": 1, "test/recall": [0.5, None, 1.0], "test/confusion": [[3, 0], [1, 2]]},
        {
            "round": 2,
            "test/recall": [0.5, None, 1.0],
            "a": [[1.0, None]],
            "nonfinite": "test/recall[1]=nan a[0][1]=inf",
        },
    ]


def test_a_finite_round_has_no_further_key(tmp_path: Path) -> None:
    assert set(read_metrics(write(tmp_path, range(1, 2)))[0]) == set(record(1))


def test_a_line_is_synced_before_round_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.start(info(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(sink.path.read_bytes()))
    for number in (1, 2):
        sink.round(record(number))
        assert len(synced) == number
        assert synced[-1] == sink.path.read_bytes()
        assert synced[-1].count(b"\n") == number
    sink.close()


def test_a_line_of_which_the_disk_took_a_part_is_completed_or_its_file_named(tmp_path: Path) -> None:
    class Slow:
        """Takes three bytes a call, and refuses after ``room`` bytes."""

        def __init__(self, room: int) -> None:
            self.room, self.data = room, b""

        def write(self, line: bytes) -> int:
            if self.room <= 0:
                raise OSError(28, "No space left on device")
            self.room -= 3
            self.data += line[:3]
            return len(line[:3])

        def fileno(self) -> int:
            return real.fileno()

    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.start(RunInfo("a", tmp_path, "", {}, 1))
    real: Any = sink._file
    sink._file = slow = cast(Any, Slow(1000))
    sink.round({"round": 1})
    assert slow.data == b'{"round": 1}\n'
    sink._file = cast(Any, Slow(6))
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        sink.round({"round": 2})
    real.close()


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_resume_gives_the_file_of_an_uninterrupted_run(tmp_path: Path, start: int) -> None:
    whole = write(tmp_path / "whole", range(1, 8)).read_bytes()
    write(tmp_path / "cut", range(1, 6))
    assert write(tmp_path / "cut", range(start + 1, 8), start=start).read_bytes() == whole


def test_resume_drops_an_incomplete_last_line(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 4))
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"round": 4, "train/lo')
    assert [line["round"] for line in read_metrics(path)] == [1, 2, 3]
    write(tmp_path, range(0), start=3)
    assert path.read_bytes() == whole


def test_resume_ends_a_complete_last_line_without_newline(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    write(tmp_path, range(0), start=3)
    assert path.read_bytes() == whole


def test_resume_does_not_reformat_earlier_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round":1,   "later/key": "ü"}\n')
    write(tmp_path, range(0), start=1)
    assert path.read_text() == '{"round":1,   "later/key": "ü"}\n'


@pytest.mark.parametrize("rounds", [[1, 2], [2, 3], [1, 3], [1, 1, 2, 3], [2, 1, 3]])
def test_resume_refuses_when_earlier_rounds_are_not_all_there(tmp_path: Path, rounds: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(n)) + "\n" for n in rounds))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*round"):
        JsonlSink(path).start(info(tmp_path, start=3))
    assert path.read_bytes() == before


def test_resume_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        JsonlSink(tmp_path / "metrics.jsonl").start(info(tmp_path, start=1))


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '"round"'])
def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(record(1))}\n{line}\n{json.dumps(record(3))}\n")
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_close_is_idempotent_also_before_start(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.close()
    sink.start(info(tmp_path))
    sink.close()
    sink.close()
