"""A federation: rows in three splits, and the training rows of every client.

It is made once, read-only and shared by all workers. Its arrays are flat NumPy arrays, which workers read from Ray's
object store without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rayfed.tasks.data.experiences import Experiences


class Rows(Protocol):
    """The rows of a split. `batch` makes tensors of some of them."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> np.ndarray:
        """(n, ...): one label per row."""

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens per row; 1 per row if rows have no tokens."""

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, Tensor]:
        """The given rows (indices, any order) as tensors by name, ``labels`` among them.

        With ``padded``, rows are padded to the longest of them. Otherwise they are concatenated without padding; only
        tasks whose `batching` can be `Unpadded` support that.
        """


class Prompts(Rows, Protocol):
    """Rows to which a model can write responses."""

    @property
    def prompts(self) -> np.ndarray:
        """(n,) int64: tokens of each prompt."""

    def prompt_batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The prompts of the given rows (indices, any order) as tensors by name, padded on the left."""


@dataclass(frozen=True, eq=False)
class NumberRows:
    """`Rows` of numbers: features (n, ...) and labels (n, ...), such as targets. Models get the input `features`."""

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, Tensor]:
        """``features`` (b, ...) and ``labels`` (b, ...); indexing copies, so the tensors may be written to."""
        return {"features": torch.from_numpy(self.features[rows]), "labels": torch.from_numpy(self.labels[rows])}


@dataclass(frozen=True)
class Federation:
    """Three splits and their classes (or outputs). Client c has the training rows ``rows[starts[c]:starts[c + 1]]``."""

    train: Rows
    validation: Rows
    test: Rows
    classes: tuple[str, ...]
    rows: np.ndarray  # (n,) int64: indices into train, client after client
    starts: np.ndarray  # (clients + 1,) int64
    extra: Any = None  # more data that the task needs
    names: np.ndarray | None = None  # (clients,) str, where the source names its clients
    experiences: Experiences | None = (
        None  # groups of classes or domains that come one after the other; None: all at once
    )

    @classmethod
    def of(
        cls, splits: Sequence[Rows], classes: tuple[str, ...], parts: Sequence[np.ndarray], names: np.ndarray | None,
        experiences: Experiences | None = None,
    ) -> Federation:  # fmt: skip
        """From (train, validation, test) and each client's training rows, ``parts``."""
        train, validation, test = splits
        rows, starts = np.concatenate(parts).astype(np.int64), np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(train, validation, test, classes, rows, starts, names=names, experiences=experiences)

    @property
    def clients(self) -> int:
        """Number of clients in the population, including clients without training rows."""
        return len(self.starts) - 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """(clients,): training rows per client."""
        return np.diff(self.starts)

    @cached_property
    def holders(self) -> np.ndarray:
        """The clients that have training rows, ascending. Only they can take part in a round."""
        return np.flatnonzero(self.sizes)

    def rows_of(self, client: int) -> np.ndarray:
        """The client's training rows, as indices into ``train``."""
        return self.rows[self.starts[client] : self.starts[client + 1]]

    @cached_property
    def by_experience(self) -> tuple[Federation, ...]:
        """For each experience a federation in which clients have only its training rows."""
        if self.experiences is None:
            return ()
        place = self.experiences.experience_of("train", self.train.labels)[self.rows]
        owners, found = np.repeat(np.arange(self.clients), self.sizes), []
        for j in range(len(self.experiences)):
            present = place == j
            starts = np.cumsum([0, *np.bincount(owners[present], minlength=self.clients)], dtype=np.int64)
            found.append(replace(self, rows=self.rows[present], starts=starts))
        return tuple(found)

    def split(self, name: str) -> Rows:
        """The split named ``train``, ``validation`` or ``test``."""
        rows: Rows = getattr(self, name)
        return rows


def only_training(rows: Rows, classes: tuple[str, ...]) -> Federation:
    """A federation of training rows alone, which nobody has."""
    return Federation(rows, rows, rows, classes, np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
