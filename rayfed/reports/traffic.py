"""What a run's ledger says: bytes by direction and part, the sizes of its messages, and its time on a stated link.

Read straight from the folder `ledger.parquet` (its columns are those of `rayfed.wire.Ledger.table`), because a report
needs no torch. Each checkpoint adds to the folder: while a run goes on, its ledger may end before its last round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rayfed.errors import UserError

DIRECTIONS = ("down", "up")
PARTS = ("header", "indices", "values")
_NUMBERS = ("round", "client", "bytes", "values", "bytes_header", "bytes_indices", "bytes_values")


@dataclass(frozen=True)
class Link:
    """A client's link, in megabits a second each way."""

    up: float
    down: float

    def __str__(self) -> str:
        return f"{self.up:g} Mbit/s up, {self.down:g} Mbit/s down"


def parse_link(text: str) -> Link:
    """`10,50` as 10 Mbit/s up and 50 down; UserError where it is not two numbers above 0."""
    try:
        up, down = map(float, text.split(","))
    except ValueError:
        up = down = 0.0
    if not (0 < up < float("inf") and 0 < down < float("inf")):
        raise UserError(f"--link: got {text!r}, but it should be UP,DOWN: two numbers of Mbit/s above 0, such as 10,50")
    return Link(up, down)


@dataclass(frozen=True, eq=False)
class Traffic:
    """One run's messages, a row each: columns by name, `up` true for uploads."""

    columns: Mapping[str, npt.NDArray[np.int64]]
    up: npt.NDArray[np.bool_]

    @property
    def rounds(self) -> int:
        """The last round in the ledger; 0 where it is empty."""
        return int(self.columns["round"].max(initial=0))

    def bytes(self, direction: str, part: str | None = None) -> int:
        """All bytes that way, or of one part: header, indices or values."""
        column = self.columns["bytes" if part is None else f"bytes_{part}"]
        return int(column[self._way(direction)].sum())

    def entries(self, direction: str) -> tuple[float, float, float] | None:
        """Smallest, median and largest number of entries in a message that way; None where there is none."""
        values = self.columns["values"][self._way(direction)]
        if not values.size:
            return None
        return float(values.min()), float(np.median(values)), float(values.max())

    def seconds(self, link: Link) -> dict[int, float]:
        """Round -> simulated seconds until its end: transfers alone, every client on a link of its own.

        A round lasts as long as its slowest client's download and upload, one after the other; training takes no time.
        """
        rate = np.where(self.up, link.up, link.down) * 1e6 / 8
        pairs = np.stack([self.columns["round"], self.columns["client"]])
        clients, at = np.unique(pairs, axis=1, return_inverse=True)
        each = np.zeros(clients.shape[1])
        np.add.at(each, at.ravel(), self.columns["bytes"] / rate)
        slowest: dict[int, float] = {}
        for number, seconds in zip(clients[0].tolist(), each.tolist()):
            slowest[number] = max(slowest.get(number, 0.0), seconds)
        ends = np.cumsum([slowest[number] for number in sorted(slowest)])
        return dict(zip(sorted(slowest), ends.tolist()))

    def _way(self, direction: str) -> npt.NDArray[np.bool_]:
        return self.up == (direction == "up")


def read_traffic(folder: Path) -> Traffic | None:
    """The ledger in a run directory; None where it has none. UserError, one line, where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "ledger.parquet"
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        columns = {name: table[name].to_numpy().astype(np.int64) for name in _NUMBERS}
        directions = table["direction"].cast(pa.string()).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = str(error).splitlines()[0].strip("'\"")
        raise UserError(f"{path}: not a ledger ({reason})") from None
    return Traffic(columns, np.array([way == "up" for way in directions], dtype=bool))
