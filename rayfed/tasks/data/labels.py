"""The column of labels, as each task reads it: one class a row, a set of classes a row, or a number a row.

Classes are numbered over all tables: integers in ascending order, strings in code-point order, a ClassLabel of the hub
in its own order. Every error names the table, the column and the row.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from rayfed.errors import UserError, allowed
from rayfed.tasks.data.columns import NAME_LENGTH, NAMES, column, is_name
from rayfed.tasks.data.table import Table

Tables = Mapping[str, Table]
ClassNames = tuple[str, ...] | None
Labels = tuple[dict[str, np.ndarray], tuple[str, ...]]
"""The labels of each table, and the names of the classes."""


def class_labels(tables: Tables, name: str, class_names: ClassNames) -> Labels:
    """One class a row: (n,) int64. UserError for a label that is no name, or where there is one class alone."""
    columns = {key: column(table, name, "data.label", is_name, f"labels {NAMES}") for key, table in tables.items()}
    known = _known(class_names)
    for table in tables.values():
        column(table, name, "data.label", known, _range(class_names))
    index = _numbered(tables, name, class_names, lambda label: (label,))
    found = {key: np.array([index[label] for label in labels], dtype=np.int64) for key, labels in columns.items()}
    return found, class_names or tuple(map(str, index))


def label_sets(tables: Tables, name: str, class_names: ClassNames) -> Labels:
    """A set of classes a row, which may be empty: (n, classes) bool, true where the row has the class.

    UserError for a value that is no list, a label that is no name or is there twice, or where there is one class alone.
    """
    known = _known(class_names)
    for table in tables.values():
        column(table, name, "data.label", lambda row: isinstance(row, list | tuple), "it should be a list of labels")
        column(table, name, "data.label", lambda row: all(map(is_name, row)), f"labels {NAMES}")
        column(table, name, "data.label", lambda row: len(set(row)) == len(row), "a label is there twice")
        column(table, name, "data.label", lambda row: all(map(known, row)), _range(class_names))
    index = _numbered(tables, name, class_names, lambda row: row)
    found = {}
    for key, table in tables.items():
        rows = table.columns[name]
        found[key] = np.zeros((len(rows), len(index)), dtype=np.bool_)
        places = [(row, index[label]) for row, labels in enumerate(rows) for label in labels]
        if places:
            found[key][tuple(np.array(places).T)] = True
    return found, class_names or tuple(map(str, index))


def numbers(tables: Tables, name: str, class_names: ClassNames) -> Labels:
    """A number a row: (n,) float32; there are no classes. UserError for a value that is no finite number of float32."""
    most = float(np.finfo(np.float32).max)

    def valid(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= most

    what = "with data.task=regression a label is a finite number"
    columns = {key: column(table, name, "data.label", valid, what) for key, table in tables.items()}
    return {key: np.array(values, dtype=np.float32) for key, values in columns.items()}, ()


def _known(class_names: ClassNames) -> Callable[[Any], bool]:
    """Whether a label is one of the classes that have names: their numbers."""
    return (lambda label: True) if class_names is None else range(len(class_names)).__contains__


def _range(class_names: ClassNames) -> str:
    return f"labels of this data set are 0 to {len(class_names or ()) - 1}"


def _numbered(
    tables: Tables, name: str, class_names: ClassNames, labels_of: Callable[[Any], Iterable[Any]]
) -> dict[Any, int]:
    """The number of each label. ``labels_of`` gives the labels of a row's value."""
    for own in class_names or ():
        if not is_name(own):
            raise allowed("data.label", own[:NAME_LENGTH], f"names of classes {NAMES}")
    first: dict[type, str] = {}  # the first label of each type, and its place
    values = set()
    for table in tables.values():
        for row, value in enumerate(table.columns[name], 1):
            for label in labels_of(value):
                values.add(label)
                first.setdefault(type(label), f"{reprlib.repr(label)} ({table.origin} row {row})")
    if len(first) > 1:
        both = " and ".join(first.values())
        raise UserError(f"data.label: got {both} in column {name!r}, but labels are all integers or all strings")
    ordered = sorted(values) if class_names is None else list(range(len(class_names)))
    if len(ordered) < 2:
        found = f"the one class {ordered[0]!r}" if ordered else "no class"
        raise UserError(f"data.label: got column {name!r} with {found}, but two are needed")
    return {label: i for i, label in enumerate(ordered)}
