"""The ledger: what travelled between server and clients, one row per payload.

Promises: ``bytes`` is ``len()`` of the payload, header, indices and values together; ``values`` is the number of
entries that travelled, the figure papers quote as parameters sent. Totals are kept as rows come. The table is ordered
by round, client and direction: one file, whatever the order of arrival. Memory does not grow with the rows: beyond a
bound they wait in a temporary file (`rows`), and the ledger's file is written and read in parts, as its row groups are.
What stays of a round is its totals.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rayfed.files import atomic_path
from rayfed.wire.codec import Sizes, inspect
from rayfed.wire.rows import COLUMNS, ROW, Block, Rows

if TYPE_CHECKING:
    import pyarrow as pa

Direction = Literal["down", "up"]
DIRECTIONS: tuple[Direction, ...] = ("down", "up")
"""``down``: server to client; ``up``: client to server."""

GROUP_ROWS = 65_536
"""Rows of a row group of the file, at most, unless a single round has more."""

_TOTALS = ("bytes/down", "bytes/up", "params/down", "params/up")
_NOTHING: Block = np.empty(0, ROW)


class Ledger:
    """What travelled in a run so far. Adding a row and asking for totals take constant time, however long the run."""

    def __init__(self) -> None:
        self._rows = Rows()
        self._by_round: dict[int, list[int]] = {}  # round -> the four totals, in the order of _TOTALS, and its rows
        self._whole = [0, 0, 0, 0, 0]

    def __len__(self) -> int:
        """Payloads that travelled."""
        return self._whole[4]

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
        self._rows.add(row)
        for totals in (self._by_round.setdefault(round, [0, 0, 0, 0, 0]), self._whole):
            totals[way] += whole
            totals[2 + way] += sizes.count
            totals[4] += 1

    def totals(self, round: int | None = None) -> dict[str, int]:
        """What travelled in one round, or in the whole run when ``round`` is None.

        Returns:
            ``bytes/down``, ``bytes/up`` (serialised) and ``params/down``, ``params/up`` (entries that travelled);
            zeros for a round in which nothing did.
        """
        numbers = self._whole if round is None else self._by_round.get(round, [0, 0, 0, 0, 0])
        return dict(zip(_TOTALS, numbers[:4], strict=True))

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run, both ways."""
        return self._whole[0] + self._whole[1]

    def table(self) -> pa.Table:
        """All rows as an Arrow table, ordered by round, client, direction (down first), then by the other columns.

        Columns: round int32, client int64, direction (dictionary of strings), and bytes, values, bytes_header,
        bytes_indices, bytes_values, all int64.
        """
        import pyarrow as pa

        return pa.concat_tables([_table(_NOTHING), *self._parts()])

    def write(self, path: Path, up_to_round: int | None = None) -> None:
        """Writes the table as Parquet (zstd), whole or not at all; without the rounds after ``up_to_round``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_path(Path(path)) as temporary:
            schema = _table(_NOTHING).schema
            # In a large cohort ids hardly repeat: their dictionary would double the file.
            repeating = [name for name in schema.names if name != "client"]
            with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=repeating) as writer:
                for part in self._parts(up_to_round):
                    writer.write_table(part)
        pa.default_memory_pool().release_unused()  # else the process keeps what the largest part took

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

        ledger = cls()
        with pq.ParquetFile(path) as file:
            missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"{path}: not a ledger, columns {', '.join(missing)} are missing")
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                ways = pc.index_in(table["direction"].cast(pa.string()), pa.array(DIRECTIONS))
                if ways.null_count:
                    raise ValueError(f"{path}: a direction is neither {' nor '.join(DIRECTIONS)}")
                rows = np.empty(len(table), ROW)
                for name in COLUMNS:
                    rows[name] = (ways if name == "direction" else table[name]).to_numpy()
                ledger._extend(rows if up_to_round is None else rows[rows["round"] <= up_to_round])
        return ledger

    def _parts(self, up_to_round: int | None = None) -> Iterator[pa.Table]:
        """The table in parts of whole rounds: as many as `GROUP_ROWS` allows, and at least one."""
        rounds: list[int] = []
        count = 0
        for round in sorted(self._by_round):
            if up_to_round is not None and round > up_to_round:
                break
            more = self._by_round[round][4]
            if rounds and count + more > GROUP_ROWS:
                yield _table(self._rows.between(rounds[0], rounds[-1]))
                rounds, count = [], 0
            rounds.append(round)
            count += more
        if rounds:
            yield _table(self._rows.between(rounds[0], rounds[-1]))

    def _extend(self, rows: Block) -> None:
        """Adds rows whose totals are still to be counted."""
        self._rows.extend(rows)
        rounds, at = np.unique(rows["round"], return_inverse=True)
        counts = np.zeros((rounds.size, 5), np.int64)
        np.add.at(counts, (at, rows["direction"]), rows["bytes"])
        np.add.at(counts, (at, rows["direction"] + np.int8(2)), rows["values"])
        counts[:, 4] = np.bincount(at, minlength=rounds.size)
        for round, more in zip(rounds.tolist(), counts.tolist(), strict=True):
            for totals in (self._by_round.setdefault(round, [0, 0, 0, 0, 0]), self._whole):
                totals[:] = map(add, totals, more)


def _table(rows: Block) -> pa.Table:
    """The rows in the ledger's order, as its columns."""
    import pyarrow as pa

    columns = {name: np.ascontiguousarray(rows[name]) for name in COLUMNS}
    order = np.lexsort(list(columns.values())[::-1])  # lexsort's last key comes first
    arrays: dict[str, pa.Array] = {name: pa.array(column[order]) for name, column in columns.items()}
    codes = arrays["direction"].cast(pa.int32())
    arrays["direction"] = pa.DictionaryArray.from_arrays(codes, pa.array(DIRECTIONS))
    return pa.table(arrays)
