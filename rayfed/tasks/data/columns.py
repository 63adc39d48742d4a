"""Columns of a table: that they are there, and that every value is one that the column may have."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rayfed.errors import UserError, allowed
from rayfed.tasks.data.table import Table, listed

SURROGATE = re.compile(r"[\ud800-\udfff]")
UNPRINTABLE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, terminal sequences among them; line ends; marks that reverse the direction of writing; halves of
surrogate pairs."""
NAME_LENGTH = 200
NAMES = f"are integers or strings, of 64 bits or of 1 to {NAME_LENGTH} printable characters"

log = logging.getLogger(__name__)


def column(table: Table, name: str, setting: str, valid: Callable[[Any], bool], what: str) -> list[Any]:
    """A column of the table. UserError if there is none, or for its first value that is not ``valid``."""
    if name not in table.columns:
        raise allowed(setting, name, f"{table.origin} has the columns {listed(table.columns)}")
    for row, value in enumerate(table.columns[name], 1):
        if not valid(value):
            place = f"{table.origin}, column {name!r}, row {row}"
            raise UserError(f"{setting}: got {reprlib.repr(value)} in {place}, but {what}")
    return table.columns[name]


def is_name(value: object) -> bool:
    """Whether the value can be a label or a client: it is shown in terminals, reports and file names."""
    if isinstance(value, str):
        return 0 < len(value) <= NAME_LENGTH and not value.isspace() and not UNPRINTABLE.search(value)
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_unicode(text: str) -> bool:
    """Whether the text has no half of a surrogate pair: JSON can contain one, and tokenizers reject it."""
    return not SURROGATE.search(text)


def texts(table: Table, name: str, setting: str) -> list[str]:
    """The column that ``setting`` names, such as `data.text`; a warning says how many of its texts are empty.

    UserError for a value that is no string of valid Unicode.
    """
    column(table, name, setting, lambda text: isinstance(text, str), "texts are strings")
    found = column(table, name, setting, is_unicode, "texts are valid Unicode")
    empty = [row for row, text in enumerate(found, 1) if not text or text.isspace()]
    if empty:
        count = f"{len(empty)} of {len(found)} texts in {table.origin}"
        log.warning("%s: %s are empty; the first is row %d", setting, count, empty[0])
    return found


def owners(table: Table, name: str | None, required: bool) -> np.ndarray | None:
    """The column `data.client` as strings (n,). UserError for a value that is no name; None where nothing names it."""
    if name is None or (name not in table.columns and not required):
        return None  # only training rows are partitioned, so only they need the column
    found = column(table, name, "data.client", is_name, f"owners {NAMES}")
    return np.array([str(owner) for owner in found], dtype=np.str_)
