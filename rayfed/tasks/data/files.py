"""Labelled texts in local files: JSON lines, CSV (both may be gzipped) or Parquet.

A folder has `train.*` and, optionally, `test.*` and `validation.*` (or `val.*`, `dev.*`), one file per split. Other
files (README, labels.json, oos_test.jsonl) are ignored. A single file is the training split, and the other splits are
drawn from it.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rayfed.config.task import Data
from rayfed.errors import UserError, allowed, first_line
from rayfed.tasks.data.table import SPLITS, Source, Table, listed

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

INTEGER = re.compile(r"[+-]?\d{1,30}")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NO_NUMBER = re.compile(r"nan|n/?a|null|none|true|false|[+-]?inf(inity)?", re.IGNORECASE)
"""What programs write into a column of numbers where there is none."""
MOST_ROW_BYTES = 2**24
MOST_RATIO = 100  # of decoded to compressed bytes: texts reach 3 to 20
SMALL = 2**23  # decoded bytes that are no danger, whatever the ratio
Columns = dict[str, list[Any]]


def read_files(settings: Data) -> Source:
    """The splits at ``data.path``: the columns that ``settings`` name, and the names of the other columns.

    JSON lines: one object per line; blank lines are skipped; a key that a row lacks is null. CSV: UTF-8 with a header;
    all columns are text, except that a label column of only integers is read as integers, and one of only numbers as
    numbers. A row of JSON or CSV has at most 16 MiB. Compressed data of more than 8 MiB are at most 100 times as large
    as their file.

    Raises UserError, with the file and if possible the line or row, if something is missing, malformed or too large.
    """
    files = split_files(existing(settings))
    return Source({split: Table(str(file), read_file(file, settings)) for split, file in files.items()})


def existing(settings: Data) -> Path:
    """`data.path`. UserError where there is nothing."""
    assert settings.path is not None  # checked by the settings
    path = Path(settings.path)
    try:
        path = path.expanduser()
        found = path.exists()
    except (OSError, RuntimeError) as error:  # the name is too long; ~user without such a user
        raise allowed("data.path", settings.path, f"it cannot be read: {first_line(error)}") from None
    if not found:
        raise allowed("data.path", settings.path, "there is no such file or folder")
    return path


def split_files(path: Path) -> dict[str, Path]:
    """The file of each split in the folder, or the file itself as the training split. UserError where none fits."""
    if path.is_dir():
        files = {split: file for split in SPLITS if (file := split_file(path, split)) is not None}
        if "train" not in files:
            present = listed(sorted(entry.name for entry in path.iterdir()))
            what = f"the folder needs a train file ({', '.join('train' + ending for ending in READERS)}); it holds"
            raise allowed("data.path", str(path), f"{what} {present}")
    else:
        if _ending(path) is None:
            raise allowed("data.path", str(path), f"a data file ends in {', '.join(READERS)}")
        files = {"train": path}
    return files


def _ending(path: Path) -> str | None:
    return next((ending for ending in READERS if path.name.lower().endswith(ending)), None)


def split_file(folder: Path, split: str) -> Path | None:
    """The folder's file for the split; None if there is none. UserError if there are several."""
    found = [
        entry
        for entry in sorted(folder.iterdir())
        if (ending := _ending(entry)) and entry.name[: -len(ending)].lower() in SPLITS[split]
    ]
    if len(found) > 1:
        names = " and ".join(entry.name for entry in found)
        raise allowed("data.path", str(folder), f"{names} are both there for the {split} split: keep one")
    return found[0] if found else None


def read_file(path: Path, settings: Data) -> Columns:
    """The columns of one file, see `read_files`."""
    ending = _ending(path)
    assert ending is not None
    if not path.is_file():  # to open a pipe would wait for ever
        raise UserError(f"data.path: {path} is not a file: it is a folder, a pipe, a device or a broken link")
    try:
        return READERS[ending](path, settings)
    except UserError:
        raise
    except Exception as error:  # pyarrow, gzip and zlib raise many kinds
        reason = first_line(error)
        if "straddl" in reason:  # pyarrow's word for a row longer than a block
            reason = f"a row of more than {MOST_ROW_BYTES} bytes, or a quote that never closes"
        raise UserError(f"data.path: {path} cannot be read: {reason}") from error


class _Stream(io.RawIOBase):
    """The bytes of a file, decompressed if it is gzipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gzipped = path.name.lower().endswith(".gz")
        self.stream = gzip.open(path) if self.gzipped else path.open("rb")  # noqa: SIM115  # closed by `close`
        self.decoded = 0
        self.tail = b""  # the last bytes that were read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.stream.readinto(buffer)
        self.decoded += count
        self.tail = (self.tail + bytes(memoryview(buffer)[:count][-64:]))[-64:]
        if self.gzipped:
            _check_size(self.path, self.decoded)
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def _check_size(path: Path, decoded: int) -> None:
    """UserError if the file's content is so much larger than the file that it must be meant to fill the memory."""
    if decoded > max(SMALL, MOST_RATIO * path.stat().st_size):
        raise UserError(
            f"data.path: {path} holds more than {MOST_RATIO} times its own size, {decoded} bytes or more; "
            "if that is right, decompress it first"
        )


def _jsonl(path: Path, settings: Data) -> Columns:
    rows: list[dict[str, Any]] = []
    with io.BufferedReader(_Stream(path), 2**20) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_ROW_BYTES + 1), b""), 1):
            if len(line) > MOST_ROW_BYTES:
                raise UserError(f"data.path: {path}, line {number} has more than {MOST_ROW_BYTES} bytes")
            if line.isspace():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text, object_pairs_hook=_object) if text.strip() else None
            except ValueError as error:  # not UTF-8, or not JSON
                raise UserError(f"data.path: {path}, line {number} is not JSON: {first_line(error)}") from error
            except RecursionError:
                raise UserError(f"data.path: {path}, line {number} is nested too deeply") from None
            if isinstance(row, dict):
                rows.append(row)
            elif text.strip():
                raise UserError(f"data.path: {path}, line {number} is not a JSON object {{...}} with the row's columns")
    names = dict.fromkeys(name for row in rows for name in row)
    return _columns(list(names), settings, lambda name: [row.get(name) for row in rows], len(rows))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a key is there twice: JSON does not say which value is meant."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return row


def _csv(path: Path, settings: Data) -> Columns:
    with io.BufferedReader(_Stream(path), 2**20) as file:
        names = _csv_reader(file).schema.names
    cells: dict[str, list[str]] = {name: [] for name in names if name in settings.columns}
    rows = 0
    last = b""  # the last cell of the last row
    stream = _Stream(path)
    with io.BufferedReader(stream, 2**20) as file:
        for batch in _csv_reader(file, [*dict.fromkeys([*cells, names[-1]])]):
            for name, column in cells.items():
                for value in batch.column(name).to_pylist():
                    try:
                        column.append(value.decode())
                    except UnicodeDecodeError as error:
                        place = f"{path}, column {name!r}, row {len(column) + 1}"
                        raise UserError(f"data.path: {place} is not UTF-8: {error.reason}") from None
            rows += batch.num_rows
            last = batch.column(names[-1])[-1].as_py() if batch.num_rows else last
    # pyarrow takes the end of the file for the missing quote. All rows after the open one are then in that cell.
    if b"\n" in last and not stream.tail.rstrip(b"\r\n").endswith(b'"'):
        raise UserError(f"data.path: {path}, row {rows} opens a quote that never closes")
    columns = _columns(names, settings, cells.__getitem__, rows)
    if settings.label in columns:
        parse = _split_labels if settings.label in settings.nested else _parse_labels
        columns[settings.label] = parse(columns[settings.label])
    return columns


def _csv_reader(file: IO[bytes], columns: list[str] | None = None) -> pyarrow.RecordBatchReader:
    """Reads the columns (None: all) block by block, as bytes.

    Not as values: pyarrow would turn texts into dates and the client 007 into 7. Not as text: it does not say which row
    is not UTF-8. Without threads, because otherwise it does not say which row has too few cells.
    """
    import pyarrow
    from pyarrow import csv

    as_bytes = {name: pyarrow.binary() for name in columns or ()}
    return csv.open_csv(
        file,
        read_options=csv.ReadOptions(use_threads=False, block_size=MOST_ROW_BYTES),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types=as_bytes, include_columns=columns or [], strings_can_be_null=False
        ),
    )


def _parse_labels(labels: list[str]) -> list[Any]:
    """CSV has no types: integers if all labels are integers, numbers if all are numbers, otherwise strings.

    An empty cell is a missing label. `nan`, `true` and the like are no names among numbers, so they stay strings there:
    the mixture is refused.
    """
    values = [_number(label) for label in labels]
    others = [value for value in values if isinstance(value, str)]
    numbers = len(others) < len(values) and all(not label or NO_NUMBER.fullmatch(label) for label in others)
    return [None if label == "" else label for label in (values if numbers else labels)]


def _split_labels(cells: list[str]) -> list[Any]:
    """The labels of each cell, with commas between them; an empty cell has none."""
    return [[_number(label.strip()) for label in cell.split(",")] if cell else [] for cell in cells]


def _number(label: str) -> int | float | str:
    if INTEGER.fullmatch(label):
        return int(label)
    return float(label) if NUMBER.fullmatch(label) else label


def _parquet(path: Path, settings: Data) -> Columns:
    from pyarrow import parquet, types

    with parquet.ParquetFile(path) as file:
        names, meta = file.schema_arrow.names, file.metadata
        for name, kind in zip(names, file.schema_arrow.types):
            if name in settings.columns and name not in settings.nested and types.is_nested(kind):
                raise UserError(f"data.path: {path}, column {name!r} has the type {kind}, but a row has a single value")
    _check_size(path, 8 * meta.num_rows)  # the least that Python values need
    return _columns(names, settings, lambda name: _parquet_column(path, meta, name), meta.num_rows)


def _parquet_column(path: Path, meta: parquet.FileMetaData, name: str) -> list[Any]:
    """The values of a column. Equal strings of a row group share their memory, as in the file."""
    from pyarrow import parquet, types

    paths = [meta.schema.column(i).path for i in range(meta.num_columns)]
    leaves = [i for i, own in enumerate(paths) if own == name or own.startswith(f"{name}.")]  # several, if nested
    groups = [meta.row_group(group) for group in range(meta.num_row_groups)]
    size = sum(group.column(leaf).total_uncompressed_size for group in groups for leaf in leaves)
    _check_size(path, size)
    # pyarrow's dictionaries have no lists, and fewer bytes than that
    shared = [name] if name in paths and size < 2**31 else []
    values: list[Any] = []
    decoded = 0
    with parquet.ParquetFile(path, metadata=meta, read_dictionary=shared) as file:
        for group in range(meta.num_row_groups):
            for chunk in file.read_row_group(group, columns=[name]).column(name).chunks:
                if not types.is_dictionary(chunk.type):
                    values += chunk.to_pylist()
                    continue
                words = chunk.dictionary.to_pylist()
                found = [None if i is None else words[i] for i in chunk.indices.to_pylist()]
                decoded += sum(len(word) for word in found if isinstance(word, str))
                _check_size(path, decoded)
                values += found
    return values


def _columns(names: list[str], settings: Data, column: Callable[[str], list[Any]], rows: int) -> Columns:
    """The columns that the settings name. The other columns are empty: error messages list their names."""
    wanted = settings.columns
    if twice := sorted({name for name in names if name in wanted and names.count(name) > 1}):
        raise UserError(f"data.path: the column {twice[0]!r} is there twice")
    return {name: column(name) if name in wanted else [] for name in names} if rows else {}


READERS: dict[str, Callable[[Path, Data], Columns]] = {
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".json", ".json.gz"), _jsonl),
    **dict.fromkeys((".csv", ".csv.gz"), _csv),
    ".parquet": _parquet,
}
