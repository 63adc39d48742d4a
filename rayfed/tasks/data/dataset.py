"""Texts or images in three splits, from any source, with labels or without.

The sources (`stdlib`, `files`, `hub`) read columns. `columns`, `labels` and `conversations` check them and number the
classes. This module draws the splits that the source lacks. Every error names the file, the column and the row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from rayfed import seeding
from rayfed.config.task import Data
from rayfed.errors import UserError, allowed
from rayfed.tasks.data.columns import owners, texts
from rayfed.tasks.data.conversations import conversations
from rayfed.tasks.data.images import read_images
from rayfed.tasks.data.labels import class_labels, label_sets, numbers
from rayfed.tasks.data.table import SPLITS, Source, Table, content

SOURCE_FIELD = {"stdlib": "data.source", "files": "data.path", "hub": "data.name", "object": "task"}
"""The setting that names the source, by `data.source`."""
READ_LABELS = {"multi_label": label_sets, "image_multi_label": label_sets, "regression": numbers}
"""What reads the column of labels, by `data.task`; `class_labels` for all others."""


@dataclass(frozen=True, eq=False)
class Split:
    """n texts (or images, see `rayfed.tasks.data.images`), in the order of the source."""

    texts: list[Any]  # (n,) str, or pairs of them; with data.task=instruction conversations; what `images` reads
    labels: np.ndarray  # (n,) int64, indices into TextData.classes; see `labels` for other tasks; 0 if not read
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

    @property
    def owners(self) -> dict[str, np.ndarray | None]:
        """The clients of the rows, by split, see `Split.owners`."""
        return {name: getattr(self, name).owners for name in SPLITS}


def load_data(
    settings: Data, seed: int, source: Source | None = None, labelled: Collection[str] = tuple(SPLITS)
) -> TextData:
    """Reads and checks the texts that ``settings`` describe (those of ``source``, if given), and gives three splits.

    Classes are numbered over all splits, before ``data.examples`` applies: integer labels in ascending order, strings
    in code-point order, a ClassLabel of the hub in its own order. ``data.examples`` then draws that many rows of the
    source's training and validation rows together (keyed by ``seed``, purpose "examples"); every row stays in its
    split. ``data.test_examples`` draws from its test split (purpose "test examples"). A split that the source lacks
    is drawn from the training rows (purpose "split"): first the test, floor(data.test * n) rows, then the validation,
    floor(data.validation * rest) rows. All rows stay in the order of the source. Labels are read in the ``labelled``
    splits of the source; without them there are no classes.

    Empty texts are rows like others; their number is logged as a warning. Raises UserError if a column is missing or
    has a value that the task cannot take, see `columns`, `labels` and `conversations`, or if train or test is empty in
    the end.
    """
    splits, classes = _read_splits(settings, source, labelled)
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
                f"{settings.examples}, data.validation={settings.validation}, data.test={settings.test}, "
                f"data.pretrain_share={settings.pretrain_share})"
            )
    return TextData(splits["train"], splits["validation"], splits["test"], classes)


def load_pretraining(
    settings: Data, source: Source | None = None, labelled: Collection[str] = tuple(SPLITS)
) -> tuple[Split, tuple[str, ...]]:
    """The rows that `data.pretrain_share` keeps from all clients, and the classes. Arguments and errors as `load_data`.

    They are taken before any split is drawn, so they are in no split of `load_data`, whatever its seed.
    """
    splits, classes = _read_splits(settings, source, labelled)
    rows = splits["train"].take(np.flatnonzero(for_pretraining(splits["train"], settings)))
    if not len(rows):
        what = f"{splits['train'].origin} has no such row; rayfed pretrain needs some"
        raise allowed("data.pretrain_share", settings.pretrain_share, what)
    return rows, classes


def for_pretraining(split: Split, settings: Data) -> np.ndarray:
    """(n,) bool: the rows of the source's training split that no client has."""
    least = int(settings.pretrain_share * 2**64)
    hashes = (hashlib.sha256(content(item)).digest()[:8] for item in split.texts)
    return np.array([int.from_bytes(found, "big") < least for found in hashes], dtype=bool)


def split_digest(split: Split) -> str:
    """SHA-256 (64 hex digits) over the texts or images and the labels."""
    digest = hashlib.sha256(split.labels.tobytes())
    for item in split.texts:
        digest.update(hashlib.sha256(content(item)).digest())
    return digest.hexdigest()


def _read_splits(
    settings: Data, source: Source | None, labelled: Collection[str]
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
        found, classes = READ_LABELS.get(settings.task, class_labels)(read, settings.label, source.class_names)
        labels |= found
    splits = {
        name: Split(
            _contents(table, settings),
            labels[name],
            owners(table, settings.client, name == "train"),
            table.origin,
        )
        for name, table in tables.items()
    }
    return splits, classes


def read_source(settings: Data) -> Source:
    """The unchecked rows that ``settings`` describe. UserError where they cannot be read."""
    # Imported here, so that pyarrow and datasets are imported only for the source that needs them.
    if settings.source == "stdlib":
        return _standard_library()
    if settings.source == "files" and settings.images:
        from rayfed.tasks.data.image_files import read_image_files

        return read_image_files(settings)
    if settings.source == "files":
        from rayfed.tasks.data.files import read_files

        return read_files(settings)
    from rayfed.tasks.data.hub import read_hub

    return read_hub(settings)


@cache
def _standard_library() -> Source:
    """Read once in a process: a sweep over seeds asks for it at every seed, and to parse it takes seconds."""
    from rayfed.tasks.data.stdlib import read_stdlib

    return read_stdlib()


def _contents(table: Table, settings: Data) -> list[Any]:
    """The texts of the table, or what takes their place."""
    if settings.task == "instruction":
        return conversations(table, settings)
    if settings.images:
        return read_images(table, settings.image)
    first = texts(table, settings.text, "data.text")
    second = settings.text_pair
    return first if second is None else list(zip(first, texts(table, second, "data.text_pair"), strict=True))


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
