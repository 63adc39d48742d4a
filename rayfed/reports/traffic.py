"""The traffic in a run's ledger: bytes by direction and part, sizes of messages, and simulated transfer time.

The folder `ledger.parquet` is read with pandas (its columns are those of `rayfed.wire.Ledger.table`), because a report
needs no torch. Each checkpoint adds a file to the folder. So the ledger of an unfinished run may lack its last rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rayfed.errors import UserError, first_line

if TYPE_CHECKING:
    import pandas as pd

DIRECTIONS = ("down", "up")
PARTS = ("header", "indices", "values")
_COLUMNS = ["round", "client", "direction", "bytes", "values", "bytes_header", "bytes_indices", "bytes_values"]


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
    """The messages of one run: one row per message, with the columns of the ledger that `read_traffic` reads."""

    messages: pd.DataFrame

    def bytes(self, direction: str, part: str) -> int:
        """Bytes of one part (`header`, `indices` or `values`) of the messages in one direction (`down` or `up`)."""
        return int(self._sent(direction)[f"bytes_{part}"].sum())

    def entries(self, direction: str) -> tuple[float, float, float] | None:
        """Smallest, median and largest number of entries per message in one direction; None without messages."""
        values = self._sent(direction)["values"]
        return (values.min(), values.median(), values.max()) if len(values) else None

    def seconds(self, link: Link) -> dict[int, float]:
        """Round -> simulated seconds from the start to the end of the round. Only transfers take time.

        Every client has its own link, downloads first and then uploads. A round lasts until its slowest client is done.
        """
        rate = np.where(self.messages["direction"] == "up", link.up, link.down) * 1e6 / 8
        seconds = self.messages.assign(seconds=self.messages["bytes"] / rate)
        of_client = seconds.groupby(["round", "client"])["seconds"].sum()
        return of_client.groupby("round").max().cumsum().to_dict()

    def _sent(self, direction: str) -> pd.DataFrame:
        return self.messages[self.messages["direction"] == direction]


def read_traffic(folder: Path) -> Traffic | None:
    """The ledger in a run directory; None if there is none. UserError if it is damaged."""
    import pandas as pd

    path = folder / "ledger.parquet"
    if not path.exists():
        return None
    try:
        return Traffic(pd.read_parquet(path, columns=_COLUMNS))
    except (KeyError, OSError, ValueError) as error:  # a column is missing, or the file is no Parquet file
        raise UserError(f"{path}: not a ledger ({first_line(error)})") from None
