"""A store that refuses: the file system `refusing://`, whose writes fail after the first ones."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class RefusingFileSystem(LocalFileSystem):
    """The local file system under `refusing:///folder`. After ``writes`` uploaded files every further one fails."""

    protocol = "refusing"
    writes: int | None = None
    """How many uploads still succeed; None: all. Counted over all instances of the process."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("refusing://")

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        cls = RefusingFileSystem
        if cls.writes is not None:
            if not cls.writes:
                raise OSError("refused: the quota is used up")
            cls.writes -= 1
        super().put_file(lpath, rpath, *args, **kwargs)


def register(writes: int | None) -> None:
    """Makes `refusing://` known to fsspec in this process, with this number of writes."""
    fsspec.register_implementation("refusing", RefusingFileSystem, clobber=True)
    RefusingFileSystem.writes = writes
