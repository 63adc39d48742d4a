"""The ledger's rows: the newest on the heap, the others in a file without a name.

Promises: fewer than `HEAP_ROWS` rows lie on the heap, 3.5 MB, however many were added. The file takes 53 bytes a row
where the system keeps temporary files (`TMPDIR`); it is gone as soon as the rows are, or the process, however it ends.
"""

from __future__ import annotations

import tempfile
import weakref
from typing import IO

import numpy as np
import numpy.typing as npt

COLUMNS = {
    "round": np.int32,
    "client": np.int64,
    "direction": np.int8,  # position in the ledger's DIRECTIONS
    "bytes": np.int64,
    "values": np.int64,
    "bytes_header": np.int64,
    "bytes_indices": np.int64,
    "bytes_values": np.int64,
}
ROW = np.dtype(list(COLUMNS.items()))
HEAP_ROWS = 65_536

Block = npt.NDArray[np.void]
"""Rows, (n,) of `ROW`."""


class Rows:
    """Rows in the order of their arrival. Whenever the heap is full, it becomes the next block of the file."""

    def __init__(self) -> None:
        self._heap: Block = np.empty(HEAP_ROWS, ROW)  # takes memory only where rows were written
        self._used = 0
        self._spilled: list[tuple[int, int]] = []  # each block's first and last round
        self._file: IO[bytes] | None = None

    def add(self, row: tuple[int, ...]) -> None:
        """One row, in the order of `COLUMNS`."""
        self._heap[self._used] = row
        self._used += 1
        if self._used == len(self._heap):
            self._spill()

    def extend(self, rows: Block) -> None:
        """Many rows at once."""
        while len(rows):
            taken = min(len(rows), len(self._heap) - self._used)
            self._heap[self._used : self._used + taken] = rows[:taken]
            self._used += taken
            rows = rows[taken:]
            if self._used == len(self._heap):
                self._spill()

    def between(self, first: int, last: int) -> Block:
        """A copy of the rows of rounds ``first`` to ``last``.

        Reads the blocks that hold such rows, one after the other: where rounds came in order, little else.
        """
        blocks = (i for i, (low, high) in enumerate(self._spilled) if low <= last and high >= first)
        parts = [_between(self._read(i), first, last) for i in blocks]
        return np.concatenate([*parts, _between(self._heap[: self._used], first, last)])

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the rows live)
            weakref.finalize(self, self._file.close)
        self._file.seek(len(self._spilled) * self._heap.nbytes)
        self._file.write(self._heap.data)
        self._spilled.append((int(self._heap["round"].min()), int(self._heap["round"].max())))
        self._used = 0

    def _read(self, i: int) -> Block:
        assert self._file is not None
        self._file.seek(i * self._heap.nbytes)
        return np.frombuffer(self._file.read(self._heap.nbytes), ROW)


def _between(rows: Block, first: int, last: int) -> Block:
    return rows[(rows["round"] >= first) & (rows["round"] <= last)]
