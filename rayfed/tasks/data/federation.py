"""A federation: rows in three splits, and who holds which training rows. Made once, read-only, shared by all workers.

Arrays are flat NumPy arrays, so Ray's object store hands them to every worker without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Rows(Protocol):
    """The rows of a split, as tensors on demand."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> np.ndarray:
        """(n, ...): one entry a row."""

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens per row; 1 where rows have no tokens."""

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, Tensor]:
        """The given rows (indices, any order) as tensors by name, ``labels`` among them.

        Either padded to the longest row, or end to end without padding where the task's batches can be so.
        """


@dataclass(frozen=True)
class Federation:
    """Three splits and their classes (or outputs). The training rows of client c are rows[starts[c]:starts[c + 1]]."""

    train: Rows
    validation: Rows
    test: Rows
    classes: tuple[str, ...]
    rows: np.ndarray  # (n,) int64
    starts: np.ndarray  # (clients + 1,) int64
    extra: Any = None  # what else the task needs of its data

    @property
    def clients(self) -> int:
        """Clients in the population, those without data included."""
        return len(self.starts) - 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """(clients,): training rows per client."""
        return np.diff(self.starts)

    @cached_property
    def holders(self) -> np.ndarray:
        """The clients that hold data, in ascending order: those that can take part."""
        return np.flatnonzero(self.sizes)

    def rows_of(self, client: int) -> np.ndarray:
        """The client's training rows: indices into ``train``."""
        return self.rows[self.starts[client] : self.starts[client + 1]]

    def split(self, name: str) -> Rows:
        """The split of that name: train, validation or test."""
        rows: Rows = getattr(self, name)
        return rows
