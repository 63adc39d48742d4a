"""Texts or images in three splits, from any source, with labels or without.

The sources (`stdlib`, `files`, `hub`) read columns. This module checks the columns, numbers the classes, and draws the
splits that the source lacks. Every error names the file, the column and the row.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import reprlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayfed import seeding
from rayfed.config.task import Data
from rayfed.errors import UserError, allowed
from rayfed.tasks.data.table import SPLITS, Source, Table, listed

SOURCE_FIELD = {"stdlib": "data.source", "files": "data.path", "hub": "data.name", "object": "task"}
"""The setting that names the source, by `data.source`."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
UNPRINTABLE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, terminal sequences among them; line ends; marks that reverse the direction of writing; halves of
surrogate pairs."""
NAME_LENGTH = 200
NAMES = f"are integers or strings, of 64 bits or of 1 to {NAME_LENGTH} printable characters"

Contents = Callable[[Table], list[Any]]
"""Reads and checks the texts, or what takes their place, of a table."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split:
    """n texts (or images, see `rayfed.tasks.data.images`), in the order of the source."""

    texts: list[Any]
    labels: np.ndarray  # (n,) int64, indices into TextData.classes; 0 where labels are not read
    owners: np.ndarray | None = None  # (n,) str: the client of each row; None without data.client or without its column
    origin: str = "the split"  # where the rows come from, for error messages
    numbers: np.ndarray | None = None  # (n,) int64: the rows' numbers there, from 0; None: 0 to n - 1

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Split:
        """The split with only these rows (indices), in this order."""
        owners = None if self.owners is None else self.owners[rows]
        numbers = rows if self.numbers is None else self.numbers[rows]
        return Split([self.texts[i] for i in rows.tolist()], self.labels[rows], owners, self.origin, numbers)

    def place(self, row: int) -> str:
        """Where the source has this row (an index), for error messages: rows count from 1 there."""
        return f"{self.origin}, row {(row if self.numbers is None else int(self.numbers[row])) + 1}"


@dataclass(frozen=True, eq=False)
class TextData:
    """Three splits over the same classes (none: no labels). Train and test have rows; validation may be empty."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]


def load_data(
    settings: Data, seed: int, source: Source | None = None, labelled: Collection[str] = tuple(SPLITS),
    contents: Contents | None = None,
) -> TextData:  # fmt: skip
    """Reads and checks the texts that ``settings`` describe (those of ``source``, if given), and gives three splits.
    ``contents`` reads something else than texts.

    Classes are numbered over all splits, before ``data.examples`` applies: integer labels in ascending order, strings
    in code-point order, a ClassLabel of the hub in its own order. ``data.examples`` then draws that many rows of the
    source's training and validation rows together (keyed by ``seed``, purpose "examples"); every row stays in its
    split. ``data.test_examples`` draws from its test split (purpose "test examples"). A split that the source lacks
    is drawn from the training rows (purpose "split"): first the test, floor(data.test * n) rows, then the validation,
    floor(data.validation * rest) rows. All rows stay in the order of the source. Labels are read in the ``labelled``
    splits of the source; without them there are no classes.

    Empty texts are rows like others; their number is logged as a warning. Raises UserError if a column is missing, a
    label or client is neither an integer of 64 bits nor a string of 1 to 200 printable characters, integers and strings
    are mixed, a text is not a string, there is only one class, or train or test is empty in the end.
    """
    splits, classes = _read_splits(settings, source, labelled, contents)
    test = {name: splits.pop(name) for name in ("test",) if name in splits}
    if settings.test_examples is not None and not test:
        raise allowed("data.test_examples", settings.test_examples, "the source has no test split; set data.test")
    if settings.pretrain_share:
        splits["train"] = splits["train"].take(np.flatnonzero(~for_pretraining(splits["train"], settings)))
    splits = _limit(splits, settings.examples, seeding.numpy_rng(seed, "examples"))
    splits |= _limit(test, settings.test_examples, seeding.numpy_rng(seed, "test examples"))
    splits = _draw_missing(splits, settings, seed)
    for name in ("train", "test"):
        if not len(splits[name]):
            raise UserError(
                f"{SOURCE_FIELD[settings.source]}: no rows are left for the {name} split (data.examples="
                f"{settings.examples}, data.validation={settings.validation}, data.test={settings.test})"
            )
    return TextData(splits["train"], splits["validation"], splits["test"], classes)


def load_pretraining(
    settings: Data, source: Source | None = None, labelled: Collection[str] = tuple(SPLITS),
    contents: Contents | None = None,
) -> tuple[Split, tuple[str, ...]]:  # fmt: skip
    """The rows that `data.pretrain_share` keeps from all clients, and the classes. Arguments and errors as `load_data`.

    They are taken before any split is drawn, so they are in no split of `load_data`, whatever its seed.
    """
    splits, classes = _read_splits(settings, source, labelled, contents)
    rows = splits["train"].take(np.flatnonzero(for_pretraining(splits["train"], settings)))
    if not len(rows):
        what = f"{splits['train'].origin} has no such row; rayfed pretrain needs some"
        raise allowed("data.pretrain_share", settings.pretrain_share, what)
    return rows, classes


def for_pretraining(split: Split, settings: Data) -> np.ndarray:
    """(n,) bool: the rows of the source's training split that no client has."""
    from rayfed.tasks.data.images import content

    least = int(settings.pretrain_share * 2**64)
    hashes = (hashlib.sha256(content(item)).digest()[:8] for item in split.texts)
    return np.array([int.from_bytes(found, "big") < least for found in hashes], dtype=bool)


def _read_splits(
    settings: Data, source: Source | None, labelled: Collection[str], contents: Contents | None
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The splits that the source has, whole, and the classes."""
    source = source or read_source(settings)
    tables = {name: source.tables[name] for name in SPLITS if name in source.tables}
    field = SOURCE_FIELD[settings.source]
    for table in tables.values():
        if not len(table):
            raise UserError(f"{field}: {table.origin} holds no rows")
    labels = {name: np.zeros(len(table), dtype=np.int64) for name, table in tables.items()}
    classes: tuple[str, ...] = ()
    if read := {name: table for name, table in tables.items() if name in labelled}:
        found, classes = _labels(read, settings.label, source.class_names)
        labels |= found
    splits = {
        name: Split(
            contents(table) if contents else _texts(table, settings.text),
            labels[name],
            _owners(table, settings.client, name == "train"),
            table.origin,
        )
        for name, table in tables.items()
    }
    return splits, classes


def read_source(settings: Data) -> Source:
    """The unchecked rows that ``settings`` describe. UserError where they cannot be read."""
    # Imported here, so that pyarrow and datasets are imported only for the source that needs them.
    if settings.source == "stdlib":
        from rayfed.tasks.data.stdlib import read_stdlib

        return read_stdlib()
    if settings.source == "files":
        from rayfed.tasks.data.files import read_files

        return read_files(settings)
    from rayfed.tasks.data.hub import read_hub

    return read_hub(settings)


def _column(table: Table, name: str, setting: str, valid: Callable[[Any], bool], what: str) -> list[Any]:
    """A column of the table. UserError if there is none, or for its first value that is not ``valid``."""
    if name not in table.columns:
        raise allowed(setting, name, f"{table.origin} has the columns {listed(table.columns)}")
    for row, value in enumerate(table.columns[name], 1):
        if not valid(value):
            place = f"{table.origin}, column {name!r}, row {row}"
            raise UserError(f"{setting}: got {reprlib.repr(value)} in {place}, but {what}")
    return table.columns[name]


def _is_name(value: object) -> bool:
    """Whether the value can be a label or a client: it is shown in terminals, reports and file names."""
    if isinstance(value, str):
        return 0 < len(value) <= NAME_LENGTH and not value.isspace() and not UNPRINTABLE.search(value)
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _texts(table: Table, column: str) -> list[str]:
    _column(table, column, "data.text", lambda text: isinstance(text, str), "texts are strings")
    # JSON can contain half a surrogate pair, which tokenizers reject.
    texts = _column(table, column, "data.text", lambda text: not SURROGATE.search(text), "texts are valid Unicode")
    empty = [row for row, text in enumerate(texts, 1) if not text or text.isspace()]
    if empty:
        count = f"{len(empty)} of {len(texts)} texts in {table.origin}"
        log.warning("data.text: %s are empty; the first is row %d", count, empty[0])
    return texts


def _owners(table: Table, column: str | None, required: bool) -> np.ndarray | None:
    if column is None or (column not in table.columns and not required):
        return None  # only training rows are partitioned, so only they need the column
    owners = _column(table, column, "data.client", _is_name, f"owners {NAMES}")
    return np.array([str(owner) for owner in owners], dtype=np.str_)


def _labels(
    tables: dict[str, Table], column: str, class_names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The labels of each split as class indices, and the class names."""
    for name in class_names or ():
        if not _is_name(name):
            raise allowed("data.label", name[:NAME_LENGTH], f"names of classes {NAMES}")
    first: dict[type, str] = {}  # the first label of each type, and its place
    for table in tables.values():
        labels = _column(table, column, "data.label", _is_name, f"labels {NAMES}")
        if class_names is not None:
            known, last = range(len(class_names)), len(class_names) - 1
            _column(table, column, "data.label", known.__contains__, f"labels of this data set are 0 to {last}")
        for row, label in enumerate(labels, 1):
            first.setdefault(type(label), f"{reprlib.repr(label)} ({table.origin} row {row})")
    if len(first) > 1:
        both = " and ".join(first.values())
        raise UserError(f"data.label: got {both} in column {column!r}, but labels are all integers or all strings")
    values = sorted({label for table in tables.values() for label in table.columns[column]})
    if class_names is not None:
        values = list(range(len(class_names)))
    if len(values) < 2:
        raise UserError(f"data.label: got column {column!r} with the one class {values[0]!r}, but two are needed")
    index = {value: i for i, value in enumerate(values)}
    indices = {
        name: np.array([index[label] for label in table.columns[column]], dtype=np.int64)
        for name, table in tables.items()
    }
    return indices, class_names or tuple(map(str, values))


def _limit(splits: dict[str, Split], examples: int | None, rng: np.random.Generator) -> dict[str, Split]:
    """``examples`` random rows of all splits together; all rows if ``examples`` is None."""
    total = sum(map(len, splits.values()))
    if examples is None or examples >= total:
        return splits
    drawn = np.sort(rng.permutation(total)[:examples])
    limited, start = {}, 0
    for name, split in splits.items():
        stop = start + len(split)
        limited[name] = split.take(drawn[(drawn >= start) & (drawn < stop)] - start)
        start = stop
    return limited


def _draw_missing(splits: dict[str, Split], settings: Data, seed: int) -> dict[str, Split]:
    """The splits, with a missing test or validation split drawn from the training rows."""
    for name, share in (("test", settings.test), ("validation", settings.validation)):
        if name in splits:
            continue
        train = splits["train"]
        order = seeding.numpy_rng(seed, "split", name).permutation(len(train))
        # 1e-9 corrects rounding: in floating point 0.29 * 100 is 28.999..., but the share is 29 rows.
        count = math.floor(share * len(train) + 1e-9)
        splits |= {name: train.take(np.sort(order[:count])), "train": train.take(np.sort(order[count:]))}
    return splits
