"""`metrics.jsonl`: one line of strict JSON a round, the run's own record and what every report reads.

JSON has no NaN and no infinities. Such a value is written as null, as if it had not been measured, and the line gets
one more key, `nonfinite`, that says what it was: `{"round": 7, "train/loss": null, "nonfinite": "train/loss=nan"}`. So
every reader can parse the line, and a diverged loss can still be told from one that was never computed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rayfed.errors import UserError
from rayfed.files import atomic_write
from rayfed.tracking.sinks import Record, RunInfo, Scalar, Table


class JsonlSink:
    """Appends every round to `path`. A line that `round` returned from is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def start(self, info: RunInfo) -> None:
        """Keeps the lines of rounds 1 to `info.start` and drops later ones, which the resumed run makes again."""
        kept = _rounds_up_to(info.start, self.path)
        atomic_write(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("ab", buffering=0)

    def round(self, record: Record) -> None:
        """Appends the line. It is one unbuffered write, so a crash can tear the last line only."""
        assert self._file is not None, "start comes before the first round, and nothing after close"
        self._file.write(f"{to_line(record)}\n".encode())
        os.fsync(self._file.fileno())

    def event(self, text: str) -> None:
        """Events are not metrics."""

    def finish(self, summary: Mapping[str, Scalar], table: Table | None) -> None:
        """The results follow from the rounds."""

    def close(self) -> None:
        """Closes the file; every line is already on the disk."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rounds in a `metrics.jsonl`, also of a run that is still going: a last line without its end is left out."""
    return [json.loads(line) for line in _whole_lines(Path(path))]


def to_line(record: Record) -> str:
    """A record as one line of strict JSON; see the module's docstring for NaN and infinities."""
    bad = {key: value for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    line = {key: None if key in bad else value for key, value in record.items()}
    if bad:
        line["nonfinite"] = " ".join(f"{key}={value}" for key, value in bad.items())
    return json.dumps(line, allow_nan=False)


def _whole_lines(path: Path) -> list[str]:
    """The text of every line. A torn last line is dropped; a broken line before it means the file was damaged."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is its folder a run directory?") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not _is_record(line):
            if number == len(lines):
                return lines[:-1]
            raise UserError(f"{path}: line {number} is not a JSON object with a round, so the file is damaged")
    return lines


def _is_record(line: str) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and isinstance(value.get("round"), int)


def _rounds_up_to(start: int, path: Path) -> list[str]:
    """The lines of rounds 1 to `start`, all of them and in order, or a refusal."""
    if start == 0:  # nothing to keep, whatever the file holds
        return []
    by_round = [(json.loads(line)["round"], line) for line in _whole_lines(path)]
    kept = [(number, line) for number, line in by_round if number <= start]
    if [number for number, _ in kept] != list(range(1, start + 1)):
        missing = sorted(set(range(1, start + 1)) - {number for number, _ in kept})
        what = f"round {missing[0]} is missing" if missing else "its rounds are not in order"
        raise UserError(f"{path}: {what}, but resuming after round {start} needs a line for each round before it")
    return [line for _, line in kept]
