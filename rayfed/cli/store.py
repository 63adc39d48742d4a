"""`--out URI`: a run directory that ends up on an object store, or on any file system that pyarrow or fsspec knows.

A run needs a real folder, because it appends to files, renames and flushes them. So it works in a folder on this
machine, `runs/` and the URI as one word; when the command ends, be the run done, failed or interrupted, the whole
directory is copied to the URI and the folder here is removed. `--resume` copies it here first.

What that cannot keep: a machine that dies, or a process killed by SIGKILL, has copied nothing since the command began.
On the same machine nothing is lost, since `--resume` finds the folder here. Without the machine, the run goes on from
what the URI held, so an `--out` on a shared disk is the one that survives it.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from rayfed.errors import RunError, UserError

PRUNED = ("checkpoints", "clients", "ledger.parquet")  # folders of a run from which files go while it runs
LAST = "checkpoints"  # copied after all else: a checkpoint never promises what is not there


def is_uri(out: str | None) -> bool:
    """Whether ``out`` names a file system, as in `s3://bucket/folder`, and not a folder of this machine."""
    return out is not None and "://" in out


def refuse_keys(uri: str) -> None:
    """UserError, without showing it, where the URI holds a key: commands and jobs are logged."""
    parts = urlsplit(uri)
    if "@" in parts.netloc and parts.scheme in ("s3", "gs", "gcs"):
        raise UserError("--out: a URI with a key in it would be logged; keys belong in the store's own settings")


@contextmanager
def folder_for(uri: str, resume: bool) -> Iterator[Path]:
    """Yields the folder here for a run whose directory belongs at ``uri``; copies it there when the block ends.

    UserError, before anything else is done, where nothing can be written there, or where something is and ``resume``
    is not set. RunError where the copy fails at the end; the folder then stays.
    """
    from rayfed.api import slug

    place = _Place(uri)
    there = place.files()
    if there and not resume:
        raise UserError(f"--out: got {uri!r}, but it is not empty; continue it with --resume or name another")
    if there and PurePosixPath("config.yaml") not in there:
        raise UserError(f"--resume: got {uri!r}, but that is no run directory: it has no config.yaml")
    here = Path("runs") / slug(uri)
    if not resume and here.exists():
        raise UserError(
            f"--out: got {uri!r}, but an earlier run for it is still in {here}; add --resume, or remove that"
        )
    place.try_writing()
    if there and not here.exists():
        place.fetch(there, here)
    try:
        yield here
    finally:
        if (here / "config.yaml").is_file():  # else it was refused, and left nothing
            try:
                place.publish(here)
            except (OSError, ValueError) as error:
                raise RunError(
                    f"--out: {uri} could not be written ({_line(error)}); all of the run stays in {here}, and --resume "
                    "copies it again"
                ) from None
            shutil.rmtree(here)


class _Place:
    """A folder on a file system of pyarrow's, or on one of fsspec's behind the same interface."""

    def __init__(self, uri: str) -> None:
        refuse_keys(uri)
        self.uri = uri
        try:
            self.system, self.root = _open(uri)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--out: got {uri!r}, but it cannot be opened ({_line(error)})") from None

    def files(self) -> set[PurePosixPath]:
        """The files below the folder, named from it; none where it is not there."""
        from pyarrow.fs import FileSelector, FileType

        try:
            found = self.system.get_file_info(FileSelector(self.root, recursive=True, allow_not_found=True))
        except (OSError, ValueError) as error:
            raise UserError(f"--out: got {self.uri!r}, but it cannot be read ({_line(error)})") from None
        root = PurePosixPath("/" + self.root.strip("/"))
        return {PurePosixPath("/" + i.path.lstrip("/")).relative_to(root) for i in found if i.type == FileType.File}

    def try_writing(self) -> None:
        """UserError where a file cannot be written: better now than after the last round."""
        name = f"{self.root}/.rayfed-{secrets.token_hex(4)}"
        try:
            self.system.create_dir(self.root, recursive=True)
            with self.system.open_output_stream(name) as stream:
                stream.write(b"rayfed")
            self.system.delete_file(name)
        except (OSError, ValueError) as error:
            raise UserError(f"--out: got {self.uri!r}, but it cannot be written ({_line(error)})") from None

    def fetch(self, names: set[PurePosixPath], here: Path) -> None:
        """Copies the files to a folder here, which appears when it is whole."""
        from rayfed.files import atomic_path

        with atomic_path(here) as folder:
            for name in sorted(names):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with self.system.open_input_stream(f"{self.root}/{name}") as source, (folder / name).open("wb") as file:
                    shutil.copyfileobj(source, file)

    def publish(self, here: Path) -> None:
        """Copies the folder's files; what a run has pruned since goes there too."""
        names = [PurePosixPath(path.relative_to(here).as_posix()) for path in here.rglob("*") if path.is_file()]
        for name in sorted(names, key=lambda name: (name.parts[0] == LAST, name)):
            self.system.create_dir(f"{self.root}/{name}".rpartition("/")[0], recursive=True)
            with (here / name).open("rb") as file, self.system.open_output_stream(f"{self.root}/{name}") as target:
                shutil.copyfileobj(file, target)
        for name in self.files() - set(names):
            if name.parts[0] in PRUNED:
                self.system.delete_file(f"{self.root}/{name}")


def _open(uri: str) -> tuple[Any, str]:
    """(file system, path on it): pyarrow's own for S3, GCS, Azure, HDFS and files, else fsspec's by the protocol."""
    import pyarrow
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        system, path = FileSystem.from_uri(uri)
    except pyarrow.ArrowInvalid:  # a protocol that pyarrow does not know
        import fsspec.core

        inner, path = fsspec.core.url_to_fs(uri)
        system = PyFileSystem(FSSpecHandler(inner))
    return system, path.rstrip("/")


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
