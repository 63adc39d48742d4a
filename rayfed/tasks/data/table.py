"""The raw columns that a data source reads, before any check: `Table` and `Source`; and what names a value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}
"""The splits, and the names that files and hub data sets may give them."""


@dataclass(frozen=True)
class Table:
    """One split: columns of plain Python values, unchecked."""

    origin: str  # where the rows come from, for error messages
    columns: dict[str, list[Any]]  # a column that the settings do not name may be an empty list

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)


@dataclass(frozen=True)
class Source:
    """The splits that a source has, ``train`` always among them, and the names of its classes if it has names."""

    tables: dict[str, Table]
    class_names: tuple[str, ...] | None = None


def listed(names: Iterable[str], most: int = 10) -> str:
    """The first names from outside, for error messages: `a, b, c, ...`; "nothing" if there are none."""
    shown = [(name if name.isprintable() else repr(name)[1:-1])[:40] for name in (name[:40] for name in names)]
    return ", ".join([*shown[:most], "..."] if len(shown) > most else shown) or "nothing"


def content(value: Any) -> bytes:
    """What names a text, a chat or an image, wherever it lies: equal values of one kind have equal contents."""
    if isinstance(value, bytes | Path):
        return value if isinstance(value, bytes) else value.read_bytes()
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    return repr(value).encode()
