"""`metrics.jsonl`: one line of strict JSON per round. All reports read this file.

JSON has no NaN and no infinities. Such a value, also inside a list, is written as null, like a value that was not
measured. The line then has the key `nonfinite` with the values: `{"round": 7, "train/loss": null, "nonfinite":
"train/loss=nan"}`. So every reader can parse the line, and a diverged loss differs from a loss that was not computed.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from rayfed.errors import UserError
from rayfed.files import atomic_write, named_errors
from rayfed.tracking.sinks import Record, RunInfo, Sink


class JsonlSink(Sink):
    """Appends every round to ``path``. When `round` returns, the line is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def start(self, info: RunInfo) -> None:
        """Drops the lines after round ``info.start``. UserError unless every earlier round has one line, in order."""
        start = info.start
        records = _records(self.path) if start else []  # a new run ignores the contents of the file
        earlier = [(record["round"], line) for record, line in records if record["round"] <= start]
        if [number for number, _ in earlier] != list(range(1, start + 1)):
            raise UserError(f"{self.path}: resuming after round {start} needs a line for each earlier round, in order")
        atomic_write(self.path, "".join(f"{line}\n" for _, line in earlier))
        self._file = self.path.open("ab", buffering=0)

    def round(self, record: Record) -> None:
        """Appends the line, unbuffered, so a crash can cut off the last line only. OSError names the file."""
        assert self._file is not None, "start comes before the first round, and nothing after close"
        line = f"{to_line(record)}\n".encode()
        with named_errors(self.path):
            while line:  # a disk that gets full takes a part of a line
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rounds in a `metrics.jsonl`, lists included. Leaves out an incomplete last line.

    UserError if there is no such file or another line is no record.
    """
    return [record for record, _ in _records(Path(path))]


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


def _records(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Every record with its line, without an incomplete last line. UserError if an earlier line is no record."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is its folder a run directory?") from None
    lines = text.removesuffix("\n").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("round"), int):
            records.append((record, line))
        elif number < len(lines):
            raise UserError(f"{path}: line {number} is not a JSON object with a round, so the file is damaged")
    return records
