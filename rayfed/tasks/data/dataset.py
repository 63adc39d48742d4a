"""Labelled texts in three splits, whatever they come from.

A source (`stdlib_source`, `files_source`, `hub_source`) reads columns and knows nothing of their meaning. This module
checks them, numbers the classes, and makes the splits that the source lacks. Every refusal names the file, the column
and the row.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayfed import seeding
from rayfed.config.task import Data
from rayfed.errors import UserError

SPLITS = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}  # and their names outside
FIELD = {"stdlib": "data.source", "files": "data.path", "hub": "data.name"}  # the setting that names the source


@dataclass(frozen=True, eq=False)
class Split:
    """n labelled texts, in the order of their source."""

    texts: list[str]
    labels: np.ndarray  # (n,) int64, indices into TextData.classes
    owners: np.ndarray | None = None  # (n,) str: who owns each row; None unless data.client is set and the column there

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Split:
        """The given rows (indices), in the given order."""
        owners = None if self.owners is None else self.owners[rows]
        return Split([self.texts[i] for i in rows.tolist()], self.labels[rows], owners)


@dataclass(frozen=True, eq=False)
class TextData:
    """A classification task: three splits over the same classes. Train and test hold rows, validation may be empty."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """One split as its source gave it: columns of plain Python values, nothing checked yet."""

    where: str  # how to name it in a refusal
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)


@dataclass(frozen=True)
class Source:
    """What a source hands over: the splits it has (``train`` always), and the names of its classes if it knows them."""

    tables: dict[str, Table]
    names: tuple[str, ...] | None = None


def load_data(settings: Data, seed: int) -> TextData:
    """Reads, checks, caps and splits the texts that ``settings`` describe.

    Classes are numbered over all splits and before ``data.examples`` applies: integer labels in ascending order,
    strings in code-point order, a hub data set's ClassLabel by its own names. ``data.examples`` then draws so many
    rows of all the splits together (keyed by ``seed``, purpose "examples"); a row stays in its split. A split that
    the source lacks is drawn from the training rows (purpose "split"): first the test, floor(share * n) rows, then the
    validation, floor(share * rest). Rows keep the order of the source throughout.

    Raises UserError where a column is missing, a label is neither an integer nor a string, integers and strings mix, a
    text is not a string, there is only one class, or train or test ends up empty.
    """
    source = _read(settings)
    tables = {name: source.tables[name] for name in SPLITS if name in source.tables}
    field = FIELD[settings.source]
    for table in tables.values():
        if not len(table):
            raise UserError(f"{field}: {table.where} holds no rows")
    labels, classes = _labels(tables, settings.label, source.names)
    splits = {
        name: Split(_texts(table, settings.text), labels[name], _owners(table, settings.client, name == "train"))
        for name, table in tables.items()
    }
    splits = _carve(_cap(splits, settings.examples, seed), settings, seed)
    for name in ("train", "test"):
        if not len(splits[name]):
            raise UserError(
                f"{field}: no rows are left for the {name} split (data.examples={settings.examples}, "
                f"data.validation={settings.validation}, data.test={settings.test})"
            )
    return TextData(splits["train"], splits["validation"], splits["test"], classes)


def _read(settings: Data) -> Source:
    # Each source imports what it needs (pyarrow, datasets) only when it is chosen.
    if settings.source == "stdlib":
        from rayfed.tasks.data.stdlib import read_stdlib

        return read_stdlib()
    if settings.source == "files":
        from rayfed.tasks.data.files import read_files

        return read_files(settings)
    from rayfed.tasks.data.hub import read_hub

    return read_hub(settings)


def _column(table: Table, name: str, setting: str) -> list[Any]:
    if name not in table.columns:
        there = ", ".join(table.columns)
        raise UserError(f"{setting}: got {name!r}, but {table.where} has the columns {there}")
    return table.columns[name]


def _refuse(setting: str, value: object, table: Table, column: str, row: int, what: str) -> UserError:
    place = f"{table.where}, column {column!r}, row {row + 1}"
    return UserError(f"{setting}: got {reprlib.repr(value)} in {place}, but {what}")


def _texts(table: Table, column: str) -> list[str]:
    texts = _column(table, column, "data.text")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise _refuse("data.text", text, table, column, row, "texts are strings")
        if not text.isascii():
            try:
                text.encode()  # JSON can spell half a surrogate pair, which no tokenizer takes
            except UnicodeEncodeError:
                raise _refuse("data.text", text, table, column, row, "texts are valid Unicode") from None
    return texts


def _owners(table: Table, column: str | None, required: bool) -> np.ndarray | None:
    if column is None or (column not in table.columns and not required):
        return None  # only training rows are partitioned, so only they need an owner
    owners = _column(table, column, "data.client")
    for row, owner in enumerate(owners):
        if isinstance(owner, bool) or not isinstance(owner, (int, str)):
            raise _refuse("data.client", owner, table, column, row, "owners are integers or strings")
    return np.array([str(owner) for owner in owners], dtype=np.str_)


def _labels(
    tables: dict[str, Table], column: str, names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The labels of each split as class indices, and the class names."""
    first: dict[type, tuple[object, str]] = {}  # the first integer and the first string, and where they were
    for table, row, label in _each(tables, column):
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise _refuse("data.label", label, table, column, row, "labels are integers or strings")
        if names is not None and not (isinstance(label, int) and 0 <= label < len(names)):
            what = f"labels of this data set are 0 to {len(names) - 1}"
            raise _refuse("data.label", label, table, column, row, what)
        first.setdefault(type(label), (label, f"{table.where} row {row + 1}"))
    if len(first) > 1:
        (a, where_a), (b, where_b) = first.values()
        raise UserError(
            f"data.label: got {reprlib.repr(a)} ({where_a}) and {reprlib.repr(b)} ({where_b}) in column {column!r}, "
            "but labels are all integers or all strings"
        )
    values = range(len(names)) if names is not None else sorted({label for _, _, label in _each(tables, column)})
    if len(values) < 2:
        raise UserError(f"data.label: got column {column!r} with the one class {values[0]!r}, but two are needed")
    index = {value: i for i, value in enumerate(values)}
    labels = {
        name: np.array([index[label] for label in table.columns[column]], dtype=np.int64)
        for name, table in tables.items()
    }
    return labels, names if names is not None else tuple(str(value) for value in values)


def _each(tables: dict[str, Table], column: str) -> Iterator[tuple[Table, int, Any]]:
    for table in tables.values():
        for row, value in enumerate(_column(table, column, "data.label")):
            yield table, row, value


def _cap(splits: dict[str, Split], examples: int | None, seed: int) -> dict[str, Split]:
    total = sum(map(len, splits.values()))
    if examples is None or examples >= total:
        return splits
    kept = np.sort(seeding.numpy_rng(seed, "examples").permutation(total)[:examples])
    capped, start = {}, 0
    for name, split in splits.items():
        stop = start + len(split)
        capped[name] = split.take(kept[(kept >= start) & (kept < stop)] - start)
        start = stop
    return capped


def _carve(splits: dict[str, Split], settings: Data, seed: int) -> dict[str, Split]:
    splits = dict(splits)
    for name, share in (("test", settings.test), ("validation", settings.validation)):
        if name in splits:
            continue
        train = splits["train"]
        rng = seeding.numpy_rng(seed, "split", name)
        away = np.zeros(len(train), dtype=bool)
        # A hair more than the product: 0.29 * 100 is 28.999... in floating point and means 29.
        away[rng.permutation(len(train))[: math.floor(share * len(train) + 1e-9)]] = True
        splits[name], splits["train"] = train.take(np.flatnonzero(away)), train.take(np.flatnonzero(~away))
    return splits
