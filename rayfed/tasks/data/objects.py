"""Labelled texts or images that are Python objects: a `datasets.Dataset`, a DataFrame, rows in a list or a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from rayfed.config.task import Data
from rayfed.errors import UserError, allowed
from rayfed.own_code import failure
from rayfed.tasks.data.table import Source, Table, content

KINDS = "a datasets.Dataset, a pandas DataFrame, a list of mappings, or a torch data set with a length"


def read_objects(splits: Mapping[str, Any], settings: Data) -> Source:
    """The splits, ``train`` among them, each one of `KINDS`.

    The items of a list or a torch data set are mappings from column to value, or tuples (text, label) or (text, label,
    client), with a second text after the first if there is one; for instruction tuning (prompt, response) or (prompt,
    response, client). A ClassLabel of the training rows gives the class names. Labels may be NumPy's or torch's
    integers. UserError where an object is of another kind.
    """
    tables = {name: Table(f"the {name} rows", _columns(rows, name, settings)) for name, rows in splits.items()}
    feature = getattr(splits["train"], "features", {}).get(settings.label)
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of the items, where a row has a list
    return Source(tables, tuple(names) if names else None)


def content_digest(source: Source) -> str:
    """SHA-256 (64 hex digits) over the columns of all splits, value by value: equal rows have equal digests."""
    digest = hashlib.sha256(repr(source.class_names).encode())
    for split, table in sorted(source.tables.items()):
        for name, values in sorted(table.columns.items()):
            digest.update(f"|{split}|{name}|{len(values)}".encode())
            for value in values:
                text = content(value)
                digest.update(b"%d:%s" % (len(text), text))
    return digest.hexdigest()


def _columns(rows: Any, split: str, settings: Data) -> dict[str, list[Any]]:
    """The columns that the settings name. The other columns are empty: error messages list their names."""
    wanted = settings.columns
    if isinstance(rows, Mapping | str | bytes) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise UserError(f"{split}: got {type(rows).__name__}, but it should be {KINDS}")
    if names := getattr(rows, "column_names", None) or list(getattr(rows, "columns", ())):
        columns = {name: list(rows[name]) if name in wanted else [] for name in names}
    else:
        items = [_mapping(_item(rows, i, split), i, split, wanted) for i in range(len(rows))]
        present = dict.fromkeys(name for item in items for name in item)
        columns = {name: [item.get(name) for item in items] if name in wanted else [] for name in present}
    plain = {settings.label, settings.client, settings.messages}
    return {name: list(map(_plain, values)) if name in plain else values for name, values in columns.items()}


def _item(rows: Any, index: int, split: str) -> Any:
    try:
        return rows[index]
    except Exception as error:  # the code of a user's own data set
        raise failure(error, UserError, f"{split}: row {index + 1}") from None


def _mapping(item: Any, index: int, split: str, wanted: tuple[str, ...]) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    if isinstance(item, tuple) and 2 <= len(item) <= len(wanted):
        return dict(zip(wanted, item, strict=False))
    what = f"a row is a mapping from column to value, or a tuple ({', '.join(wanted)})"
    raise allowed(split, item, f"row {index + 1} is that: {what}")


def _plain(value: Any) -> Any:
    """A number or an array of NumPy or torch as Python's number or list."""
    return value.tolist() if hasattr(value, "tolist") else value
