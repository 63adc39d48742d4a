"""Atomic writes: a file or folder is written under a temporary name in the same folder and then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; renames it onto ``path`` when the block ends without an error.

    The block creates a file or a folder at the yielded path. If the block fails, the temporary path is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    remove(temporary)
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            _flush(entry)
        if path.is_dir():  # a folder cannot be renamed onto a folder that holds files
            remove(path)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        remove(temporary)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes ``data`` (text as UTF-8) to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. NaN and infinities, which JSON does not have, raise ValueError."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def regular(path: Path) -> Path:
    """The path of a file that is to be read; OSError where it is missing, or a link, a device or a pipe.

    rayfed writes none of these into a run directory, and to read a device may never end.
    """
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path.name} is no regular file")
    return path


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder; links are not followed. A missing path changes nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flushes a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
