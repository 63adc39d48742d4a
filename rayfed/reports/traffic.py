"""The traffic in a run's ledger: bytes by direction and part, sizes of messages, and simulated transfer time.

The folder `ledger.parquet` is read with pyarrow (its columns are those of `rayfed.wire.Ledger.table`), because a report
needs no torch. Each checkpoint adds a file to the folder. So the ledger of an unfinished run may lack its last rounds.
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
_COLUMNS = ("round", "client", "bytes", "values", "bytes_header", "bytes_indices", "bytes_values")


@dataclass(frozen=True)
class Link:
    """A client's link: ``up`` and ``down`` in Mbit/s."""

    up: float
    down: float

    def __str__(self) -> str:
        return f"{self.up:g} Mbit/s up, {self.down:g} Mbit/s down"


def parse_link(text: str) -> Link:
    """`10,50` as 10 Mbit/s up and 50 down. UserError if the text is not two finite numbers above 0."""
    try:
        up, down = map(float, text.split(","))
    except ValueError:
        up = down = 0.0
    if not (0 < up < float("inf") and 0 < down < float("inf")):
        raise UserError(f"--link: got {text!r}, but it should be UP,DOWN: two numbers of Mbit/s above 0, such as 10,50")
    return Link(up, down)


@dataclass(frozen=True, eq=False)
class Traffic:
    """The messages of one run: name -> column of integers, one entry per message. ``up`` is true for uploads."""

    columns: Mapping[str, npt.NDArray[np.int64]]
    up: npt.NDArray[np.bool_]

    def bytes(self, direction: str, part: str | None = None) -> int:
        """Bytes in one direction (`down` or `up`), or of one part of them: `header`, `indices` or `values`."""
        column = self.columns["bytes" if part is None else f"bytes_{part}"]
        return int(column[self._way(direction)].sum())

    def entries(self, direction: str) -> tuple[float, float, float] | None:
        """Smallest, median and largest number of entries per message in one direction; None without messages."""
        values = self.columns["values"][self._way(direction)]
        if not values.size:
            return None
        return float(values.min()), float(np.median(values)), float(values.max())

    def seconds(self, link: Link) -> dict[int, float]:
        """Round -> simulated seconds from the start to the end of the round. Only transfers take time.

        Every client has its own link, downloads first and then uploads. A round lasts until its slowest client is done.
        """
        rate = np.where(self.up, link.up, link.down) * 1e6 / 8
        pairs = np.stack([self.columns["round"], self.columns["client"]])
        clients, of_client = np.unique(pairs, axis=1, return_inverse=True)
        seconds = np.zeros(clients.shape[1])
        np.add.at(seconds, of_client.ravel(), self.columns["bytes"] / rate)
        rounds, of_round = np.unique(clients[0], return_inverse=True)
        slowest = np.zeros(len(rounds))
        np.maximum.at(slowest, of_round, seconds)
        return dict(zip(rounds.tolist(), np.cumsum(slowest).tolist()))

    def _way(self, direction: str) -> npt.NDArray[np.bool_]:
        return self.up == (direction == "up")


def read_traffic(folder: Path) -> Traffic | None:
    """The ledger in a run directory; None if there is none. UserError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "ledger.parquet"
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        columns = {name: table[name].to_numpy().astype(np.int64) for name in _COLUMNS}
        directions = table["direction"].cast(pa.string()).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = str(error).splitlines()[0].strip("'\"")
        raise UserError(f"{path}: not a ledger ({reason})") from None
    return Traffic(columns, np.array([way == "up" for way in directions], dtype=bool))
