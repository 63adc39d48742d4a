"""The ledger: the bytes that travelled between server and clients, one row per payload.

``bytes`` is ``len()`` of the payload: header, indices and values together. ``values`` is the number of entries that
travelled, which papers report as parameters sent.

On disk the ledger is a folder of Parquet files. Each checkpoint adds one file, named by its last round. The files in
name order are one table, ordered by round, client and direction. ``pyarrow.parquet.read_table(folder)`` and
``pandas.read_parquet(folder)`` read it. Memory has only the totals of each round and the rows since the last write.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rayfed.errors import first_line
from rayfed.files import atomic_path
from rayfed.wire.codec import Sizes, inspect

if TYPE_CHECKING:
    import pyarrow as pa

Direction = Literal["down", "up"]
DIRECTIONS: tuple[Direction, ...] = ("down", "up")
"""``down``: server to client; ``up``: client to server."""

COLUMNS = ("round", "client", "direction", "bytes", "values", "bytes_header", "bytes_indices", "bytes_values")
_TOTALS = ("bytes/down", "bytes/up", "params/down", "params/up")


class Ledger:
    """The traffic of a run so far. `add` and `totals` take constant time, however long the run is."""

    def __init__(self) -> None:
        self._pending = array("q")  # the rows since the last write, one after the other, in the order of COLUMNS
        self._written = -1  # the last round on disk
        self._by_round: dict[int, list[int]] = {}  # round -> the four totals, in the order of _TOTALS, and its rows
        self._run = [0, 0, 0, 0, 0]

    def __len__(self) -> int:
        """The number of payloads that travelled."""
        return self._run[4]

    def add(self, *, round: int, client: int, direction: Direction, payload: bytes | memoryview) -> None:
        """Records one payload. A broadcast to ten clients is ten rows: each client downloads it.

        Args:
            round: at least 0, under 2^31, and later than the rounds that `write` has written.
            client: the client's id, a signed 64-bit integer.
            direction: ``down`` (server to client) or ``up``.
            payload: the bytes that travelled, as ``encode`` made them.

        Raises:
            ValueError: round, client or direction out of range.
            WireError: the bytes are no payload. WireError is a ValueError, too.
        """
        self.add_sizes(round=round, client=client, direction=direction, sizes=inspect(payload))

    def add_sizes(self, *, round: int, client: int, direction: Direction, sizes: Sizes) -> None:
        """As `add`, for a payload of which only the sizes are known."""
        if direction not in DIRECTIONS:
            raise ValueError(f"direction: got {direction!r}, but payloads travel {' or '.join(DIRECTIONS)}")
        if not self._written < round < 2**31:
            raise ValueError(f"round: got {round}, but it should be {self._written + 1} to {2**31 - 1}")
        if not -(2**63) <= client < 2**63:
            raise ValueError(f"client: got {client}, but it should be a signed 64-bit integer")
        parts = (sizes.bytes_header, sizes.bytes_indices, sizes.bytes_values)
        way, total = DIRECTIONS.index(direction), sum(parts)
        self._pending.extend(array("q", (round, client, way, total, sizes.count, *parts)))
        self._count(round, way, total, sizes.count)

    def totals(self, round: int | None = None) -> dict[str, int]:
        """The traffic of one round, or of the whole run when ``round`` is None.

        Returns:
            ``bytes/down``, ``bytes/up`` (serialised) and ``params/down``, ``params/up`` (entries that travelled). All
            are 0 for a round without traffic.
        """
        numbers = self._run if round is None else self._by_round.get(round, [0, 0, 0, 0, 0])
        return dict(zip(_TOTALS, numbers[:4], strict=True))

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run, both ways."""
        return self._run[0] + self._run[1]

    def table(self, folder: Path | None = None) -> pa.Table:
        """The rows since the last write as an Arrow table, after the rows in ``folder`` where one is given.

        The order is round, client, direction (down first), then the other columns. Columns: round int32, client int64,
        direction (dictionary of strings), and bytes, values, bytes_header, bytes_indices, bytes_values, all int64.
        """
        import pyarrow as pa

        rows = np.array(self._pending, np.int64).reshape(-1, len(COLUMNS))
        rows = rows[np.lexsort(rows.T[::-1])]  # lexsort's last key comes first
        arrays: dict[str, pa.Array] = {name: pa.array(column) for name, column in zip(COLUMNS, rows.T, strict=True)}
        arrays["round"], codes = arrays["round"].cast(pa.int32()), arrays["direction"].cast(pa.int32())
        arrays["direction"] = pa.DictionaryArray.from_arrays(codes, pa.array(DIRECTIONS))
        return pa.concat_tables([*map(_read, _parts(folder) if folder else ()), pa.table(arrays)])

    def write(self, folder: Path) -> None:
        """Atomically writes the rows since the last write as the folder's next part and drops them from memory.

        If there are no such rows, nothing is written, except for an empty part where the folder has no part yet.
        """
        rows = self.table()
        if len(rows) or not _parts(folder):
            _save(folder, rows)
        self._pending = array("q")
        self._written = max(self._by_round, default=-1)

    @classmethod
    def read(cls, folder: Path, up_to_round: int | None = None) -> Ledger:
        """Reads the totals of a folder, or of its rounds up to ``up_to_round``. The rows stay on the disk.

        A run that continues calls `resume`, because its next part must follow the last part of the folder.

        Raises:
            ValueError: a part is no Parquet file, lacks a column of the ledger, or names an unknown direction.
            FileNotFoundError: there is no such folder.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        ledger = cls()
        for path in _parts(folder):
            rows = _read(path)
            if up_to_round is not None:
                rows = rows.filter(pc.field("round") <= up_to_round)
            names = rows["direction"].cast(pa.string())  # dictionaries differ between row groups
            groups = rows.drop("direction").append_column("way", names).group_by(["round", "way"])
            for row in groups.aggregate([("bytes", "sum"), ("values", "sum"), ("bytes", "count")]).to_pylist():
                if row["way"] not in DIRECTIONS:
                    raise ValueError(f"{path}: direction: got {row['way']!r}, but it should be down or up")
                way = DIRECTIONS.index(row["way"])
                ledger._count(row["round"], way, row["bytes_sum"], row["values_sum"], row["bytes_count"])
        ledger._written = max(ledger._by_round, default=-1)
        return ledger

    @classmethod
    def resume(cls, folder: Path, round: int) -> Ledger:
        """Removes the rows after ``round`` from the folder, then reads it as `read` does.

        At round 0, without a checkpoint, the folder may be missing.
        """
        import pyarrow.compute as pc

        for path in _parts(folder):
            if int(path.stem.removeprefix("part-")) > round:
                if len(rows := _read(path).filter(pc.field("round") <= round)):
                    _save(folder, rows)
                path.unlink()
        return cls.read(folder) if round or Path(folder).exists() else cls()

    def _count(self, round: int, way: int, bytes: int, values: int, rows: int = 1) -> None:
        for totals in (self._by_round.setdefault(round, [0, 0, 0, 0, 0]), self._run):
            totals[way] += bytes
            totals[2 + way] += values
            totals[4] += rows


def _parts(folder: Path) -> list[Path]:
    """The parts in the order of their rounds. The temporary files of unfinished writes are hidden files."""
    return sorted(Path(folder).glob("part-*.parquet"))


def _save(folder: Path, rows: pa.Table) -> None:
    """Writes ordered rows as a part. A part without rows is named by round 0."""
    import pyarrow.parquet as pq

    last = rows["round"][-1].as_py() if len(rows) else 0
    # Most ids of a large cohort occur once: a dictionary of ids would double the file.
    repeating = [name for name in COLUMNS if name != "client"]
    with atomic_path(Path(folder) / f"part-{last:06d}.parquet") as temporary:
        pq.write_table(rows, temporary, compression="zstd", use_dictionary=repeating)


def _read(path: Path) -> pa.Table:
    """The rows of one part; ValueError as in `Ledger.read`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.read().select(COLUMNS)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path}: not a part of a ledger ({first_line(error)})") from None
