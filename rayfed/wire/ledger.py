"""The ledger: what travelled between server and clients, one row per payload.

Promises: ``bytes`` is ``len()`` of the payload, header, indices and values together; ``values`` is the number of
entries that travelled, the figure papers quote as parameters sent. A row takes some 60 bytes of memory, totals are kept
as rows come, and the table is ordered by round, client and direction: one file, whatever the order of arrival.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from rayfed.files import atomic_path
from rayfed.wire.codec import Sizes, inspect

if TYPE_CHECKING:
    import pyarrow as pa

Direction = Literal["down", "up"]
DIRECTIONS: tuple[Direction, ...] = ("down", "up")
"""``down``: server to client; ``up``: client to server."""

_COLUMNS = {
    "round": "i",
    "client": "q",
    "direction": "b",  # position in DIRECTIONS
    "bytes": "q",
    "values": "q",
    "bytes_header": "q",
    "bytes_indices": "q",
    "bytes_values": "q",
}
_TOTALS = ("bytes/down", "bytes/up", "params/down", "params/up")


class Ledger:
    """What travelled in a run so far. Adding a row and asking for totals take constant time, however long the run."""

    def __init__(self) -> None:
        self._columns = {name: array(code) for name, code in _COLUMNS.items()}
        self._by_round: dict[int, list[int]] = {}  # round -> the four totals, in the order of _TOTALS
        self._whole = [0, 0, 0, 0]

    def __len__(self) -> int:
        """Payloads that travelled."""
        return len(self._columns["round"])

    def add(self, *, round: int, client: int, direction: Direction, payload: bytes | memoryview) -> None:
        """Records one payload. A broadcast to ten clients is ten rows: each client downloads it.

        Args:
            round: at least 0, under 2^31.
            client: the client's id, a signed 64-bit integer.
            direction: ``down`` (server to client) or ``up``.
            payload: the bytes that travelled, as ``encode`` made them.

        Raises:
            ValueError: round, client or direction out of range.
            WireError: the bytes are no payload (a ValueError too).
        """
        self.add_sizes(round=round, client=client, direction=direction, sizes=inspect(payload))

    def add_sizes(self, *, round: int, client: int, direction: Direction, sizes: Sizes) -> None:
        """Records one payload that was made earlier and of which only the sizes are known; otherwise as `add`."""
        if direction not in DIRECTIONS:
            raise ValueError(f"direction: got {direction!r}, but payloads travel {' or '.join(DIRECTIONS)}")
        if not 0 <= round < 2**31 or not -(2**63) <= client < 2**63:
            raise ValueError(f"round, client: got {round}, {client}, but they are kept as 31 and 64-bit integers")
        way, whole = DIRECTIONS.index(direction), sizes.bytes_header + sizes.bytes_indices + sizes.bytes_values
        row = (round, client, way, whole, sizes.count, sizes.bytes_header, sizes.bytes_indices, sizes.bytes_values)
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        for totals in (self._by_round.setdefault(round, [0, 0, 0, 0]), self._whole):
            totals[way] += whole
            totals[2 + way] += sizes.count

    def totals(self, round: int | None = None) -> dict[str, int]:
        """What travelled in one round, or in the whole run when ``round`` is None.

        Returns:
            ``bytes/down``, ``bytes/up`` (serialised) and ``params/down``, ``params/up`` (entries that travelled);
            zeros for a round in which nothing did.
        """
        numbers = self._whole if round is None else self._by_round.get(round, [0, 0, 0, 0])
        return dict(zip(_TOTALS, numbers, strict=True))

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run, both ways."""
        return self._whole[0] + self._whole[1]

    def table(self, up_to_round: int | None = None) -> pa.Table:
        """All rows as an Arrow table, ordered by round, client, direction (down first), then by the other columns.

        With ``up_to_round`` those of later rounds are left out.

        Columns: round int32, client int64, direction (dictionary of strings), and bytes, values, bytes_header,
        bytes_indices, bytes_values, all int64.
        """
        import pyarrow as pa

        columns = {name: _numpy(column) for name, column in self._columns.items()}
        if up_to_round is not None:
            kept = columns["round"] <= up_to_round
            columns = {name: column[kept] for name, column in columns.items()}
        order = np.lexsort(list(columns.values())[::-1])  # lexsort's last key comes first
        columns = {name: column[order] for name, column in columns.items()}
        arrays: dict[str, pa.Array] = {name: pa.array(column) for name, column in columns.items()}
        codes = pa.array(columns["direction"].astype(np.int32))
        arrays["direction"] = pa.DictionaryArray.from_arrays(codes, pa.array(DIRECTIONS))
        return pa.table(arrays)

    def write(self, path: Path, up_to_round: int | None = None) -> None:
        """Writes the table as Parquet (zstd), whole or not at all; with ``up_to_round`` without later rounds' rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_path(Path(path)) as temporary:
            pq.write_table(self.table(up_to_round), temporary, compression="zstd")
        pa.default_memory_pool().release_unused()  # else the process keeps what the longest table took

    @classmethod
    def read(cls, path: Path, up_to_round: int | None = None) -> Ledger:
        """Reads a ledger back; a run that resumes after round r asks for the rows ``up_to_round=r`` and no later ones.

        Raises:
            ValueError: the file is no Parquet file, lacks a column of the ledger, or names an unknown direction.
            FileNotFoundError: there is no such file.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        table = pq.ParquetFile(path).read()
        missing = [name for name in _COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(f"{path}: not a ledger, columns {', '.join(missing)} are missing")
        ways = pc.index_in(table["direction"].cast(pa.string()), pa.array(DIRECTIONS))
        if ways.null_count:
            raise ValueError(f"{path}: a direction is neither {' nor '.join(DIRECTIONS)}")
        columns = {name: (ways if name == "direction" else table[name]).to_numpy() for name in _COLUMNS}
        if up_to_round is not None:
            kept = columns["round"] <= up_to_round
            columns = {name: column[kept] for name, column in columns.items()}
        ledger = cls()
        for name, column in ledger._columns.items():
            column.frombytes(columns[name].astype(column.typecode).tobytes())
        ledger._recount()
        return ledger

    def _recount(self) -> None:
        """Rebuilds the totals from the columns."""
        columns = {name: _numpy(column) for name, column in self._columns.items()}
        rounds, at = np.unique(columns["round"], return_inverse=True)
        counts = np.zeros((rounds.size, 4), np.int64)
        np.add.at(counts, (at, columns["direction"]), columns["bytes"])
        np.add.at(counts, (at, columns["direction"] + np.int8(2)), columns["values"])
        self._by_round = {int(r): [int(c) for c in row] for r, row in zip(rounds, counts, strict=True)}
        self._whole = [int(c) for c in counts.sum(axis=0)]


def _numpy(column: array[int]) -> npt.NDArray[np.signedinteger]:
    """A copy: an array whose buffer NumPy still holds cannot grow."""
    return np.array(column, dtype=column.typecode)
