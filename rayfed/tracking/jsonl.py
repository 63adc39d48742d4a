"""`metrics.jsonl`: one line of strict JSON per round; `summary.json`: one object at the end. All reports read both.

JSON has no NaN and no infinities. Such a value, also inside a list, is written as null, like a value that was not
measured. The line then has the key `nonfinite` with the values: `{"round": 7, "train/loss": null, "nonfinite":
"train/loss=nan"}`. So every reader can parse the line, and a diverged loss differs from a loss that was not computed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from rayfed.errors import UserError
from rayfed.files import atomic_write, named_errors, regular
from rayfed.tracking.sinks import Record, RunInfo, Sink, Table


class JsonlSink(Sink):
    """Appends every round to ``path``. When `round` returns, the line is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def start(self, info: RunInfo) -> None:
        """Drops the lines after round ``info.start``. UserError unless every earlier round has one line, in order."""
        earlier = _lines(self.path)[: info.start] if info.start else []  # a new run ignores the contents of the file
        if [record and record["round"] for record in map(_record, earlier)] != list(range(1, info.start + 1)):
            raise UserError(f"{self.path}: resuming after round {info.start} needs a line for each earlier round")
        atomic_write(self.path, "".join(f"{line}\n" for line in earlier))
        self._file = self.path.open("ab", buffering=0)

    def round(self, record: Record) -> None:
        """Appends the line, unbuffered, so a crash can cut off the last line only. OSError names the file."""
        assert self._file is not None, "start comes before the first round, and nothing after close"
        line = f"{to_line(record)}\n".encode()
        with named_errors(self.path):
            while line:  # a disk that gets full takes a part of a line
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())

    def finish(self, summary: Record, table: Table | None) -> None:
        """Writes the summary as `summary.json`, next to the file of the rounds."""
        atomic_write(self.path.with_name("summary.json"), f"{to_line(summary)}\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rounds in a `metrics.jsonl`, lists included. Leaves out an incomplete last line.

    UserError if there is no such file or another line is no record.
    """
    lines, records = _lines(Path(path)), []
    for number, line in enumerate(lines, start=1):
        if (record := _record(line)) is not None:
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}: line {number} is not a JSON object with a round, so the file is damaged")
    return records


def is_measured(record: Record, key: str) -> bool:
    """Whether the record has a value of the metric, finite or not."""
    return record.get(key) is not None or f" {key}=" in f" {record.get('nonfinite')}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none if there is no such file. UserError if it is damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no object")
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged ({error}); choose another --out") from None
    return lines


def write_lines(path: Path, lines: Iterable[Record]) -> None:
    """Writes a file of JSON lines, whole or not at all."""
    atomic_write(path, "".join(f"{to_line(line)}\n" for line in lines))


def to_line(record: Record) -> str:
    """A record as one line of strict JSON; see the module's docstring for NaN and infinities."""
    nonfinite: list[str] = []
    line = {key: _finite(value, key, nonfinite) for key, value in record.items()}
    if nonfinite:
        line["nonfinite"] = " ".join(nonfinite)
    return json.dumps(line, allow_nan=False)


def _finite(value: Any, name: str, nonfinite: list[str]) -> Any:
    """The value with None for numbers that are not finite, which are added to ``nonfinite`` as `name=nan`."""
    if isinstance(value, list):
        return [_finite(item, f"{name}[{i}]", nonfinite) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(f"{name}={value}")
        return None
    return value


def _lines(path: Path) -> list[str]:
    try:
        return regular(path).read_bytes().decode(errors="replace").removesuffix("\n").split("\n")
    except OSError:
        raise UserError(f"{path}: no such file; is its folder a run directory?") from None


def _record(line: str) -> dict[str, Any] | None:
    """The line's record; None where the line is not a JSON object with a round."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("round"), int) else None
