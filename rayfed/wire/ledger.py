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
        self._by_round: dict[int, list[int]] = {}  # round -> its totals, in the order of _TOTALS
        self._run = [0, 0, 0, 0]

    def add(self, *, round: int, client: int, direction: Direction, payload: bytes | memoryview) -> None:
        """Records one payload. A broadcast to ten clients is ten rows: each client downloads it.

        Args:
            round: at least 0, and later than the rounds that `write` has written.
            client: the client's id, a signed 64-bit integer.
            direction: ``down`` (server to client) or ``up``.
            payload: the bytes that travelled, as ``encode`` made them.

        Raises:
            WireError: the bytes are no payload.
        """
        self.add_sizes(round=round, client=client, direction=direction, sizes=inspect(payload))

    def add_sizes(self, *, round: int, client: int, direction: Direction, sizes: Sizes) -> None:
        """As `add`, for a payload of which only the sizes are known."""
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
        numbers = self._run if round is None else self._by_round.get(round, [0, 0, 0, 0])
        return dict(zip(_TOTALS, numbers, strict=True))

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run, both ways."""
        return self._run[0] + self._run[1]

    def table(self) -> pa.Table:
        """The rows since the last write as an Arrow table.

        The order is round, client, direction (down first), then the other columns. Columns: round int32, client int64,
        direction (dictionary of strings), and bytes, values, bytes_header, bytes_indices, bytes_values, all int64.
        """
        import pyarrow as pa

        rows = np.array(self._pending, np.int64).reshape(-1, len(COLUMNS))
        rows = rows[np.lexsort(rows.T[::-1])]  # lexsort's last key comes first
        arrays: dict[str, pa.Array] = {name: pa.array(column) for name, column in zip(COLUMNS, rows.T, strict=True)}
        arrays["round"], codes = arrays["round"].cast(pa.int32()), arrays["direction"].cast(pa.int32())
        arrays["direction"] = pa.DictionaryArray.from_arrays(codes, pa.array(DIRECTIONS))
        return pa.table(arrays)

    def write(self, folder: Path) -> None:
        """Atomically writes the rows since the last write as the folder's next part and drops them from memory.

        If there are no such rows, nothing is written, except for an empty part where the folder has no part yet.
        """
        rows = self.table()
        if len(rows) or not _parts(folder):
            _save(folder, rows)
        self._pending = array("q")

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Reads the totals of a folder. The rows stay on the disk.

        A run that continues calls `resume`, because its next part must follow the last part of the folder.

        Raises:
            ValueError: a part is no Parquet file or lacks a column of the ledger.
            FileNotFoundError: there is no such folder.
        """
        import pyarrow as pa

        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        ledger = cls()
        for path in _parts(folder):
            rows = _read(path)
            names = rows["direction"].cast(pa.string())  # dictionaries differ between row groups
            groups = rows.drop("direction").append_column("way", names).group_by(["round", "way"])
            for row in groups.aggregate([("bytes", "sum"), ("values", "sum")]).to_pylist():
                ledger._count(row["round"], DIRECTIONS.index(row["way"]), row["bytes_sum"], row["values_sum"])
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

    def _count(self, round: int, way: int, bytes: int, values: int) -> None:
        for totals in (self._by_round.setdefault(round, [0, 0, 0, 0]), self._run):
            totals[way] += bytes
            totals[2 + way] += values


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
