"""The ledger: the bytes that travelled between server and clients, one row per payload.

``bytes`` is ``len()`` of the payload: header, indices and values together. ``values`` is the number of entries that
travelled, which papers report as parameters sent.

On disk the ledger is a folder of Parquet files. Each checkpoint adds one part, named by its last round. The parts in
name order are one table, ordered by round, client and direction. ``pyarrow.parquet.read_table(folder)`` and
``pandas.read_parquet(folder)`` read it. Memory has only the totals of each round and the rows since the last write.

A part is never changed. ``checksum`` covers all parts: each part's bytes together with the checksum of those before.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rayfed.errors import first_line
from rayfed.files import atomic_path, regular, remove_path
from rayfed.wire.codec import Sizes, inspect

if TYPE_CHECKING:
    import pyarrow as pa

Direction = Literal["down", "up"]
DIRECTIONS: tuple[Direction, ...] = ("down", "up")
"""``down``: server to client; ``up``: client to server."""

COLUMNS = (
    "round", "client", "direction", "bytes", "values", "bytes_header", "bytes_indices", "bytes_values", "checksum"
)  # fmt: skip
_TOTALS = ("bytes/down", "bytes/up", "params/down", "params/up")


class Ledger:
    """The traffic of a run so far. `add` and `totals` take constant time, however long the run is."""

    def __init__(self) -> None:
        self._pending = array("q")  # the rows since the last write, one after the other, in the order of COLUMNS
        self._by_round: dict[int, list[int]] = {}  # round -> its totals, in the order of _TOTALS
        self._run = [0, 0, 0, 0]
        self.checksum = ""
        """64 hex digits over all parts on the disk; empty where there is none."""

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
        self._pending.extend(array("q", (round, client, way, total, sizes.count, *parts, sizes.checksum)))
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

    def rows(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The rows of rounds ``first`` to ``last`` (None: all later ones) that are not on the disk yet.

        Returns:
            int64, shape (rows, columns), in the order of `COLUMNS` and sorted by it. The direction is its index in
            `DIRECTIONS`.
        """
        rows = np.array(self._pending, np.int64).reshape(-1, len(COLUMNS))  # in the order of their rounds
        start = np.searchsorted(rows[:, 0], first)
        rows = rows[start : len(rows) if last is None else np.searchsorted(rows[:, 0], last, side="right")]
        return rows[np.lexsort(rows.T[::-1])]  # lexsort's last key comes first

    def write(self, folder: Path, last: int | None = None) -> None:
        """Atomically writes the rows up to round ``last`` (None: all) as the next part and drops them from memory.

        If there are no such rows, nothing is written, except for an empty part where the folder has no part yet.
        """
        rows = self.rows(last=last)
        if len(rows) or not _parts(folder):
            self.checksum = _chained(self.checksum, _save(folder, rows))
        self._pending = self._pending[rows.size :]

    @classmethod
    def read(cls, folder: Path, last: int | None = None) -> Ledger:
        """Reads the totals of a folder's parts up to round ``last`` (None: all). The rows stay on the disk.

        A run that continues calls `truncate` first, because its next part must follow the last part of the folder.

        Raises:
            ValueError: a part is no Parquet file or lacks a column of the ledger.
            OSError: there is no such folder, or a part is no regular file.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        ledger = cls()
        for path in _parts(folder):
            if last is None or _last_round(path) <= last:
                ledger._add_part(path)
        return ledger

    @staticmethod
    def truncate(folder: Path, last: int) -> None:
        """Removes the parts that end after round ``last``. The folder may be missing."""
        for path in _parts(folder):
            if _last_round(path) > last:
                remove_path(path)

    def _add_part(self, path: Path) -> None:
        import pyarrow as pa

        self.checksum = _chained(self.checksum, path)
        rows = _read(path)
        names = rows["direction"].cast(pa.string())  # dictionaries differ between row groups
        groups = rows.drop("direction").append_column("way", names).group_by(["round", "way"])
        for row in groups.aggregate([("bytes", "sum"), ("values", "sum")]).to_pylist():
            self._count(row["round"], DIRECTIONS.index(row["way"]), row["bytes_sum"], row["values_sum"])

    def _count(self, round: int, way: int, bytes: int, values: int) -> None:
        for totals in (self._by_round.setdefault(round, [0, 0, 0, 0]), self._run):
            totals[way] += bytes
            totals[2 + way] += values


def rounds_of(folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Every round on the disk with its rows, as `Ledger.rows` gave them; ValueError as in `Ledger.read`."""
    for path in _parts(folder):
        table = _read(path)
        ways = np.array([DIRECTIONS.index(way) for way in table["direction"].to_pylist()], np.int64)
        columns = [ways if name == "direction" else table[name].to_numpy().astype(np.int64) for name in COLUMNS]
        rows = np.stack(columns, axis=1)
        for part in np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1) if len(rows) else ():
            yield int(part[0, 0]), part


def _parts(folder: Path) -> list[Path]:
    """The parts in the order of their rounds. The temporary files of unfinished writes are hidden files."""
    parts = [path for path in Path(folder).glob("part-*.parquet") if re.fullmatch(r"part-\d{6,}", path.stem)]
    return sorted(parts, key=_last_round)


def _last_round(path: Path) -> int:
    return int(path.stem.removeprefix("part-"))


def _chained(checksum: str, path: Path) -> str:
    """The checksum of all parts up to ``path``, from that of the parts before."""
    return hashlib.sha256(f"{checksum}|{path.name}|".encode() + regular(path).read_bytes()).hexdigest()


def _save(folder: Path, rows: np.ndarray) -> Path:
    """Writes ordered rows as a part. A part without rows is named by round 0.

    Columns: round int32, direction a dictionary of strings, all others int64.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays: dict[str, pa.Array] = {name: pa.array(column) for name, column in zip(COLUMNS, rows.T, strict=True)}
    arrays["round"], codes = arrays["round"].cast(pa.int32()), arrays["direction"].cast(pa.int32())
    arrays["direction"] = pa.DictionaryArray.from_arrays(codes, pa.array(DIRECTIONS))
    # Most ids of a large cohort and most checksums occur once: a dictionary of them would double the file.
    repeating = [name for name in COLUMNS if name not in ("client", "checksum")]
    path = Path(folder) / f"part-{rows[-1, 0] if len(rows) else 0:06d}.parquet"
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(arrays), temporary, compression="zstd", use_dictionary=repeating)
    return path


def _read(path: Path) -> pa.Table:
    """The rows of one part; ValueError as in `Ledger.read`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.read().select(COLUMNS)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path}: not a part of a ledger ({first_line(error)})") from None
