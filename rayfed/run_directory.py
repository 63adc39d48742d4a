"""The directory of a run or a sweep: its name, its lock, what it may contain, and errors of its disk in one line.

One process at a time uses a directory. It holds a lock on the folder itself, which ends with the process. On Ray the
driver actor writes the directory and may outlive the process that started it: then both hold a shared lock, and another
run, which needs a lock of its own, waits for both.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from rayfed.errors import RunError, UserError, allowed
from rayfed.files import contents
from rayfed.storage import slug

SECONDS_TO_END = 10.0
"""How long `resume` waits for another process in the same folder: a killed run's driver ends soon after it."""

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # file systems without locks, such as Lustre without `flock`
_locks = threading.local()  # `handles`: this thread's locks, file descriptors by (device, inode) of the folder


@contextmanager
def locked_out(out: str | Path | None, name: str, resume: bool) -> Iterator[Path]:
    """The folder of a run or a sweep, made if it is missing, locked while the block runs; see `locked`.

    The default is `runs/NAME-TIME`, with a suffix where another run has that name. With ``resume``, a process that is
    about to end is waited for. UserError where the folder is in use or cannot be made or written.
    """
    if out is not None and not str(out):
        raise allowed("--out", out, "it should name a folder")
    folder = Path("runs") / f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S')}" if out is None else Path(out)
    with locked(folder, wait=SECONDS_TO_END if resume else 0, unique=out is None) as made:
        yield made


def check_out(out: Path, resume: bool, kind: str, settings: str) -> bool:
    """Whether the folder ``out`` has something to resume. A new run or sweep needs a new or an empty folder.

    ``kind`` is `run` or `sweep`, and ``settings`` the name of the file that every folder of that kind has. What a
    killed process left under temporary names does not count. UserError where the folder cannot be used.
    """
    _check_writable(out)
    if not contents(out):
        return False
    if not resume:
        raise UserError(f"--out: got {str(out)!r}, but it is not empty; continue it with --resume or name another")
    if not (out / settings).is_file():
        raise UserError(f"--resume: got {str(out)!r}, but that is no {kind} directory: it has no {settings}")
    if link := _first_link(out):
        raise UserError(f"--resume: got {str(out)!r}, but {link} is a link; a {kind} directory has no links")
    return True


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError of the block, which writes into ``folder``, into a RunError of one line: file and reason."""
    try:
        yield
    except BrokenPipeError:  # the reader of this process's output has gone
        raise
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(folder)
        raise RunError(f"{where}: {_reason(error)}; --resume continues from the last checkpoint") from None


@contextmanager
def locked(folder: Path, wait: float = 0, shared: bool = False, unique: bool = False) -> Iterator[Path]:
    """Makes the folder if it is missing, and locks it against other threads and processes; yields its path.

    Args:
        wait: seconds to wait for a process that uses the folder, such as one that is about to end.
        shared: other shared locks on the folder are possible at the same time. Else there is no other lock on it.
        unique: the folder must be new: where ``folder`` exists, the name gets a suffix (-2, -3, ...).

    A thread may lock a folder again within the block; the inner block then changes nothing. The lock ends with the
    process. Folders that were made here are removed at the end if they are still empty. On NFS a lock counts for the
    processes of one machine. UserError where the folder is in use, or cannot be made or written.
    """
    handles: dict[tuple[int, int], int] = vars(_locks).setdefault("handles", {})
    deadline, made = time.monotonic() + wait, []
    with _usable(folder):
        while True:
            made += _make(folder, unique)
            folder = made[-1] if unique else folder
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            key = _identity(os.fstat(handle))
            try:
                if key not in handles:
                    _lock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, folder, deadline)
                if folder.is_dir() and _identity(folder.stat()) == key:
                    break
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its last user has removed it: make it again
    inner = key in handles
    try:
        if not inner:
            handles[key] = handle
        yield folder
    finally:
        if not inner:
            del handles[key]
        for empty in reversed(made):
            with suppress(OSError):
                empty.rmdir()
        os.close(handle)


def share_lock(folder: Path) -> None:
    """Makes this thread's lock on the folder a shared one. UserError where another process has locked it meanwhile."""
    handle = _locks.handles[_identity(folder.stat())]
    # The kernel gives the old lock up before it grants the new one, so another process can come in between.
    _lock(handle, fcntl.LOCK_SH, folder, time.monotonic())


def lock_alone(folder: Path) -> bool:
    """Tries to end the sharing of this thread's lock on the folder: True where no other process has a lock on it."""
    try:
        return _lock(_locks.handles[_identity(folder.stat())], fcntl.LOCK_EX, folder, time.monotonic())
    except UserError:
        return False


def _check_writable(folder: Path) -> None:
    """UserError where no file can be written into the folder."""
    with _usable(folder), tempfile.TemporaryFile(dir=folder):
        pass


def _first_link(folder: Path) -> Path | None:
    """A link in the folder, or None. Folders of W&B and of Ray Tune, which have links of their own, are left out."""
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent) / name for name in sorted(folders + names)):
            if path.is_symlink():
                return path
        folders[:] = [name for name in folders if name not in ("wandb", "tune")]
    return None


def _make(folder: Path, unique: bool) -> list[Path]:
    """Makes the folder and its parents; returns those that were missing, the folder last."""
    for path in folder.parents if unique else (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise allowed("--out", str(folder), f"{path} is a file")
        if path.is_symlink() and not path.exists():
            raise allowed("--out", str(folder), f"{path} is a link to nothing")
    missing = [parent for parent in reversed(folder.parents) if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not unique:
        with suppress(FileExistsError):
            folder.mkdir()
            missing.append(folder)
        return missing
    for number in count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            path.mkdir()
            return [*missing, path]
    raise AssertionError


def _lock(handle: int, kind: int, folder: Path, deadline: float) -> bool:
    """Locks the folder, at the latest at ``deadline``, else UserError; False where the file system has no locks."""
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise allowed("--out", str(folder), "another process is using it") from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise allowed("--out", str(folder), f"it cannot be used as a folder ({_reason(error)})") from None


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
