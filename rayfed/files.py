"""Atomic writes: a file or folder is written under a temporary name in the same folder and then renamed.

A process that is killed may leave a temporary name, `.NAME.PID.partial`. Such names are never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".*.partial"
"""The pattern of temporary names."""
UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(UMASK)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; renames it onto ``path`` when the block ends without an error.

    The block creates a file or a folder at the yielded path. If the block fails, the temporary path is removed. Errors
    of the disk are OSErrors that name ``path``, also those that a library raises as errors of its own.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_path(temporary)
        try:
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                _share(entry)
                _flush(entry)
            if path.is_dir():  # a folder cannot be renamed onto a folder that holds files
                remove_path(path)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            remove_path(temporary)


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


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Errors of the disk in the block become OSErrors that name ``path``, also where they named no file.

    Libraries written in Rust, such as safetensors, have `(os error 28)` in the texts of their own errors.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(match[1])
        other = getattr(error, "filename", None)  # a file elsewhere keeps its name
        if number is None or (other and not str(other).startswith(str(path.parent))):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def contents(folder: Path) -> list[Path]:
    """What lies in the folder, without the temporary names that killed processes left."""
    return [path for path in folder.iterdir() if not path.match(PARTIAL)]


def remove_path(path: Path) -> None:
    """Removes a file, a link (never what it points to) or a folder with its contents, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _share(path: Path) -> None:
    """Gives a file the rights of any new file: safetensors makes files that only their owner may read."""
    if path.is_file():
        path.chmod(0o666 & ~UMASK)


def _flush(path: Path) -> None:
    """Flushes a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
