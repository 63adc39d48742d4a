"""Plain lines of a fixed format, a bar on a terminal, and missing values in both."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from rayfed.tracking import Record, RunInfo, Table, Value
from rayfed.tracking.console import ConsoleSink
from rayfed.tracking.format import clock, loss, megabytes, percent, short

RESULTS = Table("results", ("model", "accuracy", "MB"), (("dense", "71.2 %", "82.1"), ("masked", "7.9 %", "1234.5")))

GOLDEN = """\
quickstart: 12 rounds, continuing after round 8, digest 0123456789abcdef
out runs/first
population 350, clients without data 3, trainable parameters 1,234,567,
test examples 3,080
                loss  accuracy  down MB   up MB  total MB  seconds      eta
round  9/12    1.234         -     0.42    0.40      2.50      1.8     0:05
round 10/12    1.100    71.2 %     0.42  0.0040      2.92      1.8     0:04
* a worker died and was replaced
round 11/12        -    71.2 %        -       -         -     60.0     0:02
round 12/12      nan    70.0 %     12.3     123      1234      1.8     0:00

results
model   accuracy      MB
------  --------  ------
dense     71.2 %    82.1
masked     7.9 %  1234.5
"""


def info(rounds: int = 12, start: int = 8) -> RunInfo:
    facts = {
        "population": 350,
        "clients without data": 3,
        "trainable parameters": 1234567,
        "probe": None,
        "test examples": 3080,
    }
    return RunInfo("quickstart", Path("runs/first"), "0123456789abcdef", {}, rounds, start, facts)


def record(number: int, **values: float | None) -> Record:
    usual: dict[str, Value] = {
        "round": number,
        "train/loss": 1.1,
        "eval/accuracy": None,
        "bytes/down": 420_000,
        "bytes/up": 400_000,
        "bytes/total": 2_500_000,
        "time/round_s": 1.8,
        "clients/odd": 7,
        "eval/recall": [0.5, None, 0.25],
        "state/digest": "00ff",
    }
    return usual | {key.replace("__", "/"): value for key, value in values.items()}


def play(sink: ConsoleSink) -> None:
    sink.start(info())
    sink.round(record(9, train__loss=1.234))
    sink.round(record(10, eval__accuracy=0.712, bytes__up=4_000, bytes__total=2_920_000))
    sink.event("a worker died and was replaced")
    sink.round({"round": 11, "train/loss": None, "bytes/down": None, "eval/accuracy": None, "time/round_s": 60.0})
    big = {"bytes__down": 12_300_000, "bytes__up": 123_000_000, "bytes__total": 1_234_000_000}
    sink.round(record(12, train__loss=float("nan"), eval__accuracy=0.7, **big))
    sink.finish({"test/accuracy": 0.7}, RESULTS)
    sink.close()
    sink.close()


def seen(text: str) -> str:
    """The text without terminal control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_plain_output_has_this_shape() -> None:
    stream = io.StringIO()
    play(ConsoleSink("plain", stream))
    assert stream.getvalue() == GOLDEN
    assert max(map(len, stream.getvalue().splitlines())) <= 80


def test_plain_lines_fit_80_columns_also_in_long_runs_with_large_numbers() -> None:
    stream = io.StringIO()
    sink = ConsoleSink("plain", stream)
    sink.start(info(rounds=5000, start=0))
    big = {"bytes__down": 9_999_000_000, "bytes__up": 9_999_000_000, "bytes__total": 99_999_000_000_000}
    for number in range(1, 45):
        sink.round(record(number, train__loss=-1e30, eval__accuracy=1.0, time__round_s=3000.0, **big))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.startswith("round")]
    assert len(rows) == 44
    assert len({len(line) for line in rows}) == 1  # aligned
    assert sum("accuracy" in line for line in lines) == 3  # the names come back in a long log
    assert all(re.search(r" -1\.0e\+30 +100\.0 % +9999 +9999 +99999000 +3000 +\d+d \d+h$", line) for line in rows)


@pytest.mark.parametrize("mode", ["plain", "rich"])
def test_a_task_with_another_metric_shows_it(mode: Literal["plain", "rich"]) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(mode, stream)
    sink.start(replace(info(), metric="map"))
    sink.round(record(9, eval__map=0.123, eval__accuracy=0.9))
    sink.close()
    shown = seen(stream.getvalue())
    assert re.search(r"\bmap\b", shown)
    assert "12.3 %" in shown
    assert "accuracy" not in shown


def test_time_left_is_the_median_and_ignores_one_slow_round() -> None:
    stream = io.StringIO()
    sink = ConsoleSink("plain", stream)
    sink.start(info(rounds=10, start=0))
    for number, seconds in enumerate((2.0, 2.0, 500.0, 2.0), start=1):
        sink.round(record(number, time__round_s=seconds))
    assert stream.getvalue().splitlines()[-1].endswith(" 0:12")


def test_time_left_forgets_the_distant_past() -> None:
    stream = io.StringIO()
    sink = ConsoleSink("plain", stream)
    sink.start(info(rounds=100, start=0))
    for number in range(1, 41):
        sink.round(record(number, time__round_s=9.0 if number <= 30 else 1.0))
    assert stream.getvalue().splitlines()[-1].endswith(" 1:00")


def test_test_accuracy_shows_only_until_there_is_a_validation() -> None:
    stream = io.StringIO()
    sink = ConsoleSink("plain", stream)
    sink.start(info())
    sink.round(record(9, test__accuracy=0.25))
    sink.round(record(10, test__accuracy=0.5, eval__accuracy=0.75))
    sink.round(record(11, test__accuracy=0.5))
    shown = [line.split(" %")[0].split()[-1] for line in stream.getvalue().splitlines() if line.startswith("round")]
    assert shown == ["25.0", "75.0", "75.0"]


def test_without_a_table_the_scalars_of_the_summary_show() -> None:
    stream = io.StringIO()
    sink = ConsoleSink("plain", stream)
    sink.start(info())
    sink.finish(
        {"test/accuracy": 0.71234, "bytes/total": 1234567, "probe": None, "why": "early stop", "recall": [0.5]}, None
    )
    cells = [line.rsplit("  ", 1) for line in stream.getvalue().splitlines()[-3:]]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["test/accuracy", "0.7123"],
        ["bytes/total", "1,234,567"],
        ["why", "early stop"],
    ]


def test_rich_draws_a_bar_and_shows_the_same_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    play(ConsoleSink("rich", stream))
    raw, text = stream.getvalue(), seen(stream.getvalue())
    assert "━" in text
    assert raw.index("\x1b[?25l") < raw.rindex("\x1b[?25h")  # the cursor comes back
    for line in GOLDEN.splitlines()[:4]:
        assert line in text
    assert re.search(r"round  9/12 ━.* loss 1\.234  accuracy -  2\.50 MB eta 0:05", text)
    assert re.search(r"round 11/12 ━.* loss -  accuracy 71\.2 %  - MB eta 0:02", text)
    assert re.search(r"round 12/12 ━.* loss nan  accuracy 70\.0 %  1234 MB eta 0:00", text)
    assert "\n* a worker died and was replaced\n" in text.replace("\r", "\n")
    table = text[text.rindex("results") :]
    for row in (RESULTS.columns, *RESULTS.rows):
        assert re.search(r"[┃│]\s+".join(map(re.escape, (row[0], *row[1:]))).replace("[┃│]", r"\s*[┃│]"), table), row


@pytest.mark.parametrize("columns", ["80", "40"])
def test_rich_stays_inside_the_terminal_and_cuts_no_cell(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    stream = io.StringIO()
    sink = ConsoleSink("rich", stream)
    sink.start(info(rounds=5000, start=0))
    sink.round(record(4321, train__loss=-1e30, eval__accuracy=1.0, time__round_s=9000.0, bytes__total=99_999_000_000))
    wide = "a very long cell " * 6
    sink.finish({}, Table("wide", ("name", "value"), ((wide, "[bold]1[/bold]"),)))
    sink.close()
    text = seen(stream.getvalue())
    assert all(len(line) <= int(columns) for line in re.split(r"[\r\n]", text) if "━" in line or "│" in line)
    table = text[text.rindex("wide") :]
    name_cells = re.findall(r"^[│┃](.*?)[│┃]", table, flags=re.MULTILINE)
    assert "".join("".join(name_cells).split()).count("averylongcell") == 6
    assert "[bold]1[/bold]" in table  # a cell is text, not markup


@pytest.mark.parametrize("end", ["close", "finish"])
def test_rich_gives_stdout_back(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    before = sys.stdout, sys.stderr
    sink = ConsoleSink("rich")
    sink.start(info())
    print("output of a worker")
    assert sys.stdout is not before[0]
    if end == "close":
        sink.close()
    else:
        sink.finish({}, RESULTS)
    assert (sys.stdout, sys.stderr) == before
    assert "output of a worker" in stream.getvalue()


@pytest.mark.parametrize(
    ("terminal", "term", "bar"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_auto_is_rich_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, terminal: bool, term: str, bar: bool) -> None:
    monkeypatch.setenv("TERM", term)
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    play(ConsoleSink("auto", stream))
    assert ("\x1b[?25l" in stream.getvalue()) == bar


def test_a_character_that_the_stream_cannot_encode_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    sink = ConsoleSink("plain", io.TextIOWrapper(raw, encoding="ascii"))
    sink.start(RunInfo("größe", Path("out"), "d", {}, 1))
    sink.close()
    assert raw.getvalue().startswith(b"gr??e: 1 rounds")


@pytest.mark.parametrize("mode", ["plain", "rich"])
def test_close_before_start_and_after_an_error_is_fine(mode: str) -> None:
    ConsoleSink(mode, io.StringIO()).close()  # type: ignore[arg-type]
    sink = ConsoleSink(mode, io.StringIO())  # type: ignore[arg-type]
    sink.start(info())
    sink.close()
    sink.close()


def test_units() -> None:
    assert [megabytes(n) for n in (None, 0, 1, 40_000, 420_000, 12_300_000, 5e9)] == [
        "-", "0.00", "0.0000", "0.0400", "0.42", "12.3", "5000"
    ]  # fmt: skip
    assert [clock(s) for s in (0, 31.4, 59.6, 725, 3723, 390_000)] == [
        "0:00", "0:31", "1:00", "12:05", "1:02:03", "4d 12h"
    ]  # fmt: skip
    assert [loss(x) for x in (None, 1.23449, 999.0, 1e6, float("inf"))] == ["-", "1.234", "999.000", "1.0e+06", "inf"]
    assert [percent(x) for x in (None, 0.712)] == ["-", "71.2 %"]
    assert [short(x) for x in (1234567, 0.71234, "text")] == ["1,234,567", "0.7123", "text"]
