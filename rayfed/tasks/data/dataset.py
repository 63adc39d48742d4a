"""Labelled texts in three splits, from any source.

The sources (`stdlib`, `files`, `hub`) read columns. This module checks the columns, numbers the classes, and draws the
splits that the source lacks. Every error names the file, the column and the row.
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
from rayfed.tasks.data.table import SPLITS, Source, Table

SOURCE_FIELD = {"stdlib": "data.source", "files": "data.path", "hub": "data.name"}
"""The setting that names the source, by `data.source`."""


@dataclass(frozen=True, eq=False)
class Split:
    """n labelled texts, in the order of the source."""

    texts: list[str]
    labels: np.ndarray  # (n,) int64, indices into TextData.classes
    owners: np.ndarray | None = None  # (n,) str: the client of each row; None without data.client or without its column

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Split:
        """The split with only these rows (indices), in this order."""
        owners = None if self.owners is None else self.owners[rows]
        return Split([self.texts[i] for i in rows.tolist()], self.labels[rows], owners)


@dataclass(frozen=True, eq=False)
class TextData:
    """Three splits over the same classes. Train and test have rows; validation may be empty."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]


def load_data(settings: Data, seed: int) -> TextData:
    """Reads and checks the texts that ``settings`` describe, and gives the three splits.

    Classes are numbered over all splits, before ``data.examples`` applies: integer labels in ascending order, strings
    in code-point order, a ClassLabel of the hub in its own order. ``data.examples`` then draws that many rows of all
    splits together (keyed by ``seed``, purpose "examples"); every row stays in its split. A split that the source lacks
    is drawn from the training rows (purpose "split"): first the test, floor(data.test * n) rows, then the validation,
    floor(data.validation * rest) rows. All rows stay in the order of the source.

    Raises UserError if a column is missing, a label is neither an integer nor a string, integers and strings are mixed,
    a text is not a string, there is only one class, or train or test is empty in the end.
    """
    source = _read(settings)
    tables = {name: source.tables[name] for name in SPLITS if name in source.tables}
    field = SOURCE_FIELD[settings.source]
    for table in tables.values():
        if not len(table):
            raise UserError(f"{field}: {table.origin} holds no rows")
    labels, classes = _labels(tables, settings.label, source.class_names)
    splits = {
        name: Split(_texts(table, settings.text), labels[name], _owners(table, settings.client, name == "train"))
        for name, table in tables.items()
    }
    splits = _draw_missing(_limit(splits, settings.examples, seed), settings, seed)
    for name in ("train", "test"):
        if not len(splits[name]):
            raise UserError(
                f"{field}: no rows are left for the {name} split (data.examples={settings.examples}, "
                f"data.validation={settings.validation}, data.test={settings.test})"
            )
    return TextData(splits["train"], splits["validation"], splits["test"], classes)


def _read(settings: Data) -> Source:
    # Imported here, so that pyarrow and datasets are imported only for the source that needs them.
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
        raise UserError(f"{setting}: got {name!r}, but {table.origin} has the columns {', '.join(table.columns)}")
    return table.columns[name]


def _bad_value(setting: str, value: object, table: Table, column: str, row: int, what: str) -> UserError:
    place = f"{table.origin}, column {column!r}, row {row + 1}"
    return UserError(f"{setting}: got {reprlib.repr(value)} in {place}, but {what}")


def _texts(table: Table, column: str) -> list[str]:
    texts = _column(table, column, "data.text")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise _bad_value("data.text", text, table, column, row, "texts are strings")
        if not text.isascii():
            try:
                text.encode()  # JSON can contain half a surrogate pair, which tokenizers reject
            except UnicodeEncodeError:
                raise _bad_value("data.text", text, table, column, row, "texts are valid Unicode") from None
    return texts


def _owners(table: Table, column: str | None, required: bool) -> np.ndarray | None:
    if column is None or (column not in table.columns and not required):
        return None  # only training rows are partitioned, so only they need the column
    owners = _column(table, column, "data.client")
    for row, owner in enumerate(owners):
        if isinstance(owner, bool) or not isinstance(owner, (int, str)):
            raise _bad_value("data.client", owner, table, column, row, "owners are integers or strings")
    return np.array([str(owner) for owner in owners], dtype=np.str_)


def _labels(
    tables: dict[str, Table], column: str, class_names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The labels of each split as class indices, and the class names."""
    first: dict[type, tuple[object, str]] = {}  # the first label of each type, and its place
    for table, row, label in _all_labels(tables, column):
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise _bad_value("data.label", label, table, column, row, "labels are integers or strings")
        if class_names is not None and not (isinstance(label, int) and 0 <= label < len(class_names)):
            what = f"labels of this data set are 0 to {len(class_names) - 1}"
            raise _bad_value("data.label", label, table, column, row, what)
        first.setdefault(type(label), (label, f"{table.origin} row {row + 1}"))
    if len(first) > 1:
        (a, place_a), (b, place_b) = first.values()
        raise UserError(
            f"data.label: got {reprlib.repr(a)} ({place_a}) and {reprlib.repr(b)} ({place_b}) in column {column!r}, "
            "but labels are all integers or all strings"
        )
    values = (
        sorted({label for _, _, label in _all_labels(tables, column)})
        if class_names is None
        else range(len(class_names))
    )
    if len(values) < 2:
        raise UserError(f"data.label: got column {column!r} with the one class {values[0]!r}, but two are needed")
    index = {value: i for i, value in enumerate(values)}
    labels = {
        name: np.array([index[label] for label in table.columns[column]], dtype=np.int64)
        for name, table in tables.items()
    }
    return labels, tuple(str(value) for value in values) if class_names is None else class_names


def _all_labels(tables: dict[str, Table], column: str) -> Iterator[tuple[Table, int, Any]]:
    """Every label with its table and row."""
    for table in tables.values():
        for row, label in enumerate(_column(table, column, "data.label")):
            yield table, row, label


def _limit(splits: dict[str, Split], examples: int | None, seed: int) -> dict[str, Split]:
    """``examples`` random rows of all splits together; all rows if ``examples`` is None."""
    total = sum(map(len, splits.values()))
    if examples is None or examples >= total:
        return splits
    drawn = np.sort(seeding.numpy_rng(seed, "examples").permutation(total)[:examples])
    limited, start = {}, 0
    for name, split in splits.items():
        stop = start + len(split)
        limited[name] = split.take(drawn[(drawn >= start) & (drawn < stop)] - start)
        start = stop
    return limited


def _draw_missing(splits: dict[str, Split], settings: Data, seed: int) -> dict[str, Split]:
    """The splits, with a missing test or validation split drawn from the training rows."""
    splits = dict(splits)
    for name, share in (("test", settings.test), ("validation", settings.validation)):
        if name in splits:
            continue
        train = splits["train"]
        drawn = np.zeros(len(train), dtype=bool)
        order = seeding.numpy_rng(seed, "split", name).permutation(len(train))
        # 1e-9 corrects rounding: in floating point 0.29 * 100 is 28.999..., but the share is 29 rows.
        drawn[order[: math.floor(share * len(train) + 1e-9)]] = True
        splits[name], splits["train"] = train.take(np.flatnonzero(drawn)), train.take(np.flatnonzero(~drawn))
    return splits
