"""`--out URI`: a run directory on any file system that fsspec opens, such as S3, Google Cloud Storage or Azure.

A run appends to files and renames them, which object stores cannot do. The run therefore works in a local folder, and
the folder is uploaded after every checkpoint and once more when the command ends. At any moment the remote folder can
be resumed: files go first, checkpoints next, the `checkpoint.json` of each checkpoint after its tensors, `summary.json`
(the run, or the trial of a sweep, has ended) last, and deletions after that.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import TypeGuard

from rayfed.errors import RunError, Terminated, UserError, first_line
from rayfed.files import contents, remove_path

# Folders that lose files while a run goes on. Their files are never rewritten: the name says the round.
PRUNED = {"checkpoints", "clients", "ledger.parquet"}
MARKERS = ("config.yaml", "sweep.yaml")
"""The file by which the directory of a run or a sweep is known."""
# In these schemes a word before "@" is a user name or a container. In all others the word may be a key.
NAMES_BEFORE_AT = {"abfs", "abfss", "az", "ftp", "hdfs", "oci", "sftp", "smb", "ssh"}
# User-info reaches to the last "@" once it has a colon, because secret keys of S3 may contain "/" and "@".
# One slash is enough: `pathlib` writes `ftp://me` as `ftp:/me`.
USER_INFO = re.compile(r"([\w+.-]*)(:/+)([^/:\s]*(?:(?::|%3[aA]).*)?)@", re.DOTALL)
QUERY = re.compile(r"(:/+[^\s?]*)\?\S*")
NAME_LENGTH = 100
"""Bytes of a name in a path, at most; file systems allow 255, and suffixes follow."""


def is_uri(out: str | None) -> TypeGuard[str]:
    """Whether ``out`` is a URI, as in `s3://bucket/folder`, and not a local folder."""
    return out is not None and "://" in out


def slug(name: str) -> str:
    """``name`` as one component of a path, at most NAME_LENGTH bytes: a run's name or a URI."""
    short = re.sub(r"[^\w.-]+", "-", name).encode()[:NAME_LENGTH].decode(errors="ignore")
    return short.strip(".-") or "run"


def local_folder(uri: str) -> Path:
    """The local folder in which the run for this URI works. It has a digest in its name: equal slugs are no clash."""
    return Path("runs") / f"{slug(masked(uri))}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def masked(text: str) -> str:
    """A URI, or any text with URIs, for messages and logs: with `***` in place of user-info and query."""
    return QUERY.sub(r"\1?***", USER_INFO.sub(r"\1\2***@", text))


def refuse_credentials(text: str, field: str = "--out") -> None:
    """Raises UserError if the text has a URI with a password, a key or a query string. The message shows none."""
    infos = USER_INFO.findall(text)
    if QUERY.search(text) or any(
        re.search(":|%3a", info, re.IGNORECASE) or scheme.lower() not in NAMES_BEFORE_AT for scheme, _, info in infos
    ):
        raise UserError(
            f"{field}: the URI has a password, a key or a query string, but commands and jobs are logged; "
            "give credentials in the storage's own settings or environment variables"
        )


class RemoteFolder:
    """The folder at a URI. UserError if the URI has credentials or cannot be opened."""

    def __init__(self, uri: str) -> None:
        import fsspec.core
        from fsspec.registry import known_implementations

        refuse_credentials(uri)
        self.uri = masked(uri)
        # fsspec's error names the package to install, adlfs, only for `abfs`.
        known_implementations.setdefault("abfss", known_implementations["abfs"])
        with self._user_error("opened"):
            self._system, root = fsspec.core.url_to_fs(uri)
        self._root = root.rstrip("/")
        self._uploaded: dict[str, tuple[int, int]] | None = None

    def files(self) -> dict[str, int]:
        """Size in bytes of every remote file by POSIX name relative to the folder. Hidden files are left out."""
        with self._user_error("read"):
            return self._files()

    def check_writable(self) -> None:
        """Raises UserError where a file cannot be written and deleted. Called before a run starts to train."""
        name = f".rayfed-{secrets.token_hex(4)}"
        with self._user_error("written"):
            self._make_parent(name)
            self._system.pipe_file(self._path(name), b"rayfed")
            self._system.rm_file(self._path(name))

    def download(self, folder: Path) -> None:
        """Downloads all files into the local ``folder``, MARKERS last. If that fails, nothing of them is there.

        Checkpoints whose upload was interrupted are left out. UserError where a file cannot be read.
        """
        partial = folder / f".download.{os.getpid()}.partial"
        try:
            with self._user_error("read"):
                found = self._files()
                names = [n for n in found if not (top := _checkpoint(n)) or f"{top}/checkpoint.json" in found]
                partial.mkdir(parents=True)
                for name in names:
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                self._system.get([self._path(n) for n in names], [str(partial / n) for n in names])
                for entry in sorted(partial.iterdir(), key=lambda path: path.name in MARKERS):
                    remove_path(folder / entry.name)
                    entry.rename(folder / entry.name)
        finally:
            remove_path(partial)
        self._uploaded = _local_files(folder)

    def upload(self, folder: Path) -> None:
        """Uploads files that are new or changed since this object's last upload or download; deletes pruned files.

        An object's first upload leaves out files that are never rewritten and have their size at the remote already:
        another object has uploaded them. Hidden files stay local. Other processes may write to ``folder`` meanwhile. A
        missing ``folder`` changes nothing. RunError where the remote folder cannot be written.
        """
        if not folder.is_dir():
            return
        try:
            # Records and checkpoints are listed first: the files that they refer to exist before they do.
            later = {n: stamp for n, stamp in _local_files(folder).items() if _stage(n)}
            found = {n: stamp for n, stamp in _local_files(folder).items() if not _stage(n)} | later
            if self._uploaded is None:
                there = self._files()
                self._uploaded = {n: s for n, s in found.items() if _pruned(n) and there.get(n) == s[0]}
            changed = [n for n, stamp in found.items() if self._uploaded.get(n) != stamp]
            vanished = set()  # checkpoints that a run has pruned since the listing
            for name in sorted(changed, key=_order):
                if _stage(name) == 2 and _checkpoint(name) in vanished:
                    continue
                self._make_parent(name)
                try:
                    self._system.put_file(str(folder / name), self._path(name))
                    self._uploaded[name] = found[name]
                except FileNotFoundError:
                    if (folder / name).exists():
                        raise
                    vanished.add(_checkpoint(name))
            self._prune(folder)
        except Exception as error:
            raise RunError(
                f"--out: {self.uri} could not be written ({masked(first_line(error))}); "
                f"the local folder {folder} has everything, and --resume uploads again"
            ) from None

    def _prune(self, folder: Path) -> None:
        """Deletes remote files of folders in PRUNED that are not in ``folder``; `checkpoint.json` before the rest."""
        for name in sorted(self._files(), key=_order, reverse=True):
            if _pruned(name) and not (folder / name).is_file():
                with suppress(FileNotFoundError):
                    self._system.rm_file(self._path(name))
                if not self._system.async_impl:
                    with suppress(Exception):  # the folder still has files
                        self._system.rmdir(self._path(name).rpartition("/")[0])

    def _files(self) -> dict[str, int]:
        self._system.invalidate_cache()  # another machine may have written since
        root = self._root.strip("/")
        # By default fsspec's search treats a folder that cannot be listed as empty. Object stores raise an error.
        options = {} if self._system.async_impl else {"on_error": "raise"}
        try:
            found = self._system.find(self._root, detail=True, **options)
        except FileNotFoundError:
            return {}
        sizes = {n.strip("/").removeprefix(root).strip("/"): info.get("size") or 0 for n, info in found.items()}
        # The check for a leading dot also excludes "..", which would name a file outside the folder.
        return {n: size for n, size in sizes.items() if n and not any(p.startswith(".") for p in n.split("/"))}

    def _make_parent(self, name: str) -> None:
        # Object stores, which are fsspec's asynchronous file systems, need no folders; some would create a bucket.
        if not self._system.async_impl:
            self._system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _user_error(self, done: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every storage library has exceptions of its own
            raise UserError(f"--out: got {self.uri!r}, but it cannot be {done} ({masked(first_line(error))})") from None


def _local_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change in nanoseconds of every file by POSIX name, without hidden files and links."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent) / name for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):  # a run has removed the file since
                status = path.lstat()
                if S_ISREG(status.st_mode):  # a link would upload a foreign file
                    found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


def _checkpoint(name: str) -> str | None:
    """The checkpoint to which a file belongs, as in `trials/a/checkpoints/round-000002`; None for other files."""
    match = re.match(r"((?:.*/)?checkpoints/[^/]+)/", name)
    return match[1] if match else None


def _pruned(name: str) -> bool:
    return bool(PRUNED.intersection(PurePosixPath(name).parts[:-1]))


def _stage(name: str) -> int:
    """When a file is uploaded: 0 other files, 1 a checkpoint's tensors, 2 `checkpoint.json`, 3 `summary.json`."""
    if _checkpoint(name):
        return 1 + name.endswith("/checkpoint.json")
    return 3 if PurePosixPath(name).name == "summary.json" else 0


def _order(name: str) -> tuple[int, str]:
    return _stage(name), name


def fetch(remote: RemoteFolder, folder: Path, resume: bool, marker: str = "config.yaml") -> None:
    """Downloads the directory of a run or sweep into its `local_folder`, unless that has it already.

    ``marker`` is the file by which such a directory is known. The caller has locked ``folder``. UserError where nothing
    can be written at the URI, or where the folder there is not empty and either ``resume`` is not set or it has no
    ``marker``.
    """
    there = remote.files()
    if there and not resume:
        raise UserError(f"--out: got {remote.uri!r}, but it is not empty; continue it with --resume or name another")
    if there and marker not in there:
        raise UserError(f"--resume: got {remote.uri!r}, but that is no directory to resume: it has no {marker}")
    if not resume and contents(folder):
        raise UserError(
            f"--out: got {remote.uri!r}, but an earlier run for it is still in {folder}; add --resume, or remove that"
        )
    remote.check_writable()
    if there and not (folder / marker).is_file():
        remote.download(folder)


@contextmanager
def uploaded(remote: RemoteFolder | None, folder: Path, marker: str = "config.yaml") -> Iterator[None]:
    """Uploads the folder of a run or sweep when the block ends, however it ends; not before the folder has ``marker``.

    Without ``remote`` nothing is done. RunError where the remote folder cannot be written.
    """
    try:
        yield
    finally:
        if remote and (folder / marker).is_file():
            try:
                remote.upload(folder)
            except Terminated:  # what `--out` promises comes first
                remote.upload(folder)
                raise
