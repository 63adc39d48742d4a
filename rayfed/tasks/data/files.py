"""Labelled texts in local files: JSON lines, CSV (both may be gzipped) or Parquet.

A folder has `train.*` and, optionally, `test.*` and `validation.*` (or `val.*`, `dev.*`), one file per split. Other
files (README, labels.json, oos_test.jsonl) are ignored. A single file is the training split, and the other splits are
drawn from it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayfed.config.task import Data
from rayfed.errors import UserError, allowed, first_line
from rayfed.tasks.data.table import SPLITS, Source, Table

INTEGER = re.compile(r"[+-]?\d+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
Columns = dict[str, list[Any]]


def read_files(settings: Data) -> Source:
    """The splits at ``data.path``: the columns that ``settings`` name, and the names of the other columns.

    JSON lines: one object per line; blank lines are skipped; a key that a row lacks is null. CSV: UTF-8 with a header;
    all columns are text, except that a label column of only integers is read as integers, and one of only numbers as
    numbers. Raises UserError, with the file and if possible the line, if something is missing or malformed.
    """
    assert settings.path is not None  # checked by the settings
    path = Path(settings.path).expanduser()
    if not path.exists():
        raise allowed("data.path", settings.path, "there is no such file or folder")
    if path.is_dir():
        files = {split: file for split in SPLITS if (file := _split_file(path, split)) is not None}
        if "train" not in files:
            present = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
            what = f"the folder needs a train file ({', '.join('train' + ending for ending in READERS)}); it holds"
            raise allowed("data.path", settings.path, f"{what} {present}")
    else:
        if _ending(path) is None:
            raise allowed("data.path", settings.path, f"a data file ends in {', '.join(READERS)}")
        files = {"train": path}
    return Source({split: Table(str(file), _read(file, settings)) for split, file in files.items()})


def _ending(path: Path) -> str | None:
    return next((ending for ending in READERS if path.name.lower().endswith(ending)), None)


def _split_file(folder: Path, split: str) -> Path | None:
    """The folder's file for the split; None if there is none. UserError if there are several."""
    found = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.is_file() and (ending := _ending(entry)) and entry.name[: -len(ending)].lower() in SPLITS[split]
    ]
    if len(found) > 1:
        names = " and ".join(entry.name for entry in found)
        raise allowed("data.path", str(folder), f"{names} are both there for the {split} split: keep one")
    return found[0] if found else None


def _read(path: Path, settings: Data) -> Columns:
    ending = _ending(path)
    assert ending is not None
    try:
        return READERS[ending](path, settings)
    except UserError:
        raise
    # pyarrow raises ValueError and OSError; a truncated or corrupt gzip file raises one of the others.
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.path: {path} cannot be read: {first_line(error)}") from error


def _jsonl(path: Path, settings: Data) -> Columns:
    rows: list[dict[str, Any]] = []
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except ValueError as error:  # not UTF-8, or not JSON
                raise UserError(f"data.path: {path}, line {number} is not JSON: {error}") from error
            if isinstance(row, dict):
                rows.append(row)
            elif text.strip():
                raise UserError(f"data.path: {path}, line {number} is not a JSON object {{...}} with the row's columns")
    names = dict.fromkeys(name for row in rows for name in row)
    return _columns(list(names), settings, lambda name: [row.get(name) for row in rows], len(rows))


def _csv(path: Path, settings: Data) -> Columns:
    import pyarrow
    from pyarrow import csv

    # Read as strings: pyarrow would turn texts into dates and the client 007 into 7. With more than one thread, errors
    # do not name the row.
    as_text = {name: pyarrow.string() for name in (settings.text, settings.label, settings.client) if name}
    with pyarrow.input_stream(str(path)) as stream:
        table = csv.read_csv(
            stream,
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=as_text, strings_can_be_null=False),
        )
    columns = _columns(table.column_names, settings, lambda name: table.column(name).to_pylist(), table.num_rows)
    if settings.label in columns:
        columns[settings.label] = _parse_labels(columns[settings.label])
    return columns


def _parse_labels(labels: list[str]) -> list[Any]:
    """CSV has no types: integers if all labels are integers, numbers if all are numbers, otherwise strings."""
    if all(INTEGER.fullmatch(label) for label in labels):
        return [int(label) for label in labels]
    if all(NUMBER.fullmatch(label) for label in labels):
        return [float(label) for label in labels]
    return [label or None for label in labels]  # an empty cell is a missing label


def _parquet(path: Path, settings: Data) -> Columns:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return _columns(
            file.schema_arrow.names,
            settings,
            lambda name: file.read(columns=[name]).column(name).to_pylist(),
            file.metadata.num_rows,
        )


def _columns(names: list[str], settings: Data, column: Callable[[str], list[Any]], rows: int) -> Columns:
    """The columns that the settings name. The other columns are empty: error messages list their names."""
    wanted = (settings.text, settings.label, settings.client)
    if twice := sorted({name for name in names if name in wanted and names.count(name) > 1}):
        raise UserError(f"data.path: the column {twice[0]!r} is there twice")
    return {name: column(name) if name in wanted else [] for name in names} if rows else {}


READERS: dict[str, Callable[[Path, Data], Columns]] = {
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".json", ".json.gz"), _jsonl),
    **dict.fromkeys((".csv", ".csv.gz"), _csv),
    ".parquet": _parquet,
}
