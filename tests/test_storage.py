"""A run's folder on remote file systems: upload order, pruning, download, and URIs with credentials."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from rayfed.errors import RunError, UserError
from rayfed.storage import RemoteFolder, is_uri, local_folder, masked, refuse_credentials, slug

URI = "memory://bucket/runs/one"
FILES = ("adapter/x.bin", "clients/3/round-000002.safetensors", "config.yaml", "ledger.parquet/part-2", "metrics.jsonl")
CHECKPOINT = ("checkpoints/round-000002/state.safetensors", "checkpoints/round-000002/checkpoint.json")


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of uploaded files in their order."""
    names: list[str] = []
    real = MemoryFileSystem.put_file

    def record(self: Any, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        names.append(rpath.removeprefix("/bucket/runs/one/"))
        real(self, lpath, rpath, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", record)
    return names


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()
        if not any((folder / name).parent.iterdir()):
            (folder / name).parent.rmdir()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_round_trip_keeps_every_file(memory: Any, tmp_path: Path, scheme: str) -> None:
    uri = URI if scheme == "memory" else f"file://{tmp_path}/[remote] folder"
    write(tmp_path / "run", *FILES, *CHECKPOINT, "trials/a[x=1]*/config.yaml")
    (tmp_path / "run/empty.log").touch()
    RemoteFolder(uri).check_writable()
    assert RemoteFolder(uri).files() == {}
    RemoteFolder(uri).upload(tmp_path / "run")
    remote = RemoteFolder(uri)
    assert remote.files() == {name: len(data) for name, data in contents(tmp_path / "run").items()}
    remote.download(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "run")


def test_checkpoints_go_after_other_files_checkpoint_json_after_its_tensors_and_summaries_last(
    memory: Any, put: list[str], tmp_path: Path
) -> None:
    write(
        tmp_path,
        *FILES,
        *CHECKPOINT,
        *(f"trials/b/{name}" for name in (*FILES, *CHECKPOINT)),
        "zz.log",
        "trials/b/summary.json",
    )
    RemoteFolder(URI).upload(tmp_path)
    tensors, facts = CHECKPOINT
    assert put[-5:] == [tensors, f"trials/b/{tensors}", facts, f"trials/b/{facts}", "trials/b/summary.json"]
    assert len(put) == 2 * len(FILES) + 1 + 5


def test_only_new_and_changed_files_are_uploaded_again(memory: Any, put: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, *FILES, *CHECKPOINT)
    remote = RemoteFolder(URI)
    remote.upload(folder)
    put.clear()
    remote.upload(folder)
    assert put == []
    write(folder, "report.html")
    (folder / "metrics.jsonl").write_text("longer than before, by a line")
    stamp = (folder / "config.yaml").stat().st_mtime_ns + 1
    os.utime(folder / "config.yaml", ns=(stamp, stamp))
    remote.upload(folder)
    assert put == ["config.yaml", "metrics.jsonl", "report.html"]
    put.clear()
    fresh = RemoteFolder(URI)
    fresh.download(tmp_path / "other")
    fresh.upload(tmp_path / "other")
    assert put == []  # what was just downloaded


def test_a_fresh_object_skips_files_that_are_never_rewritten_and_have_their_size_at_the_remote(
    memory: Any, put: list[str], tmp_path: Path
) -> None:
    write(tmp_path, *FILES, *CHECKPOINT)
    RemoteFolder(URI).upload(tmp_path)
    put.clear()
    (tmp_path / "clients/3/round-000002.safetensors").write_text("of another size")
    RemoteFolder(URI).upload(tmp_path)
    assert put == ["adapter/x.bin", "clients/3/round-000002.safetensors", "config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize("prefix", ["", "trials/a/"])
def test_files_that_a_run_pruned_are_deleted_after_the_upload(memory: Any, tmp_path: Path, prefix: str) -> None:
    old = [f"{prefix}{name}" for name in (FILES[1], FILES[3], *CHECKPOINT)]
    new = [name.replace("000002", "000004").replace("part-2", "part-4") for name in old]
    write(tmp_path, *old, f"{prefix}events.log", "adapter/x.bin")
    remote = RemoteFolder(URI)
    remote.upload(tmp_path)
    remove(tmp_path, *old, f"{prefix}events.log", "adapter/x.bin")
    write(tmp_path, *new)
    RemoteFolder(URI).upload(tmp_path)
    assert set(remote.files()) == {*new, f"{prefix}events.log", "adapter/x.bin"}


def test_a_pruned_checkpoint_loses_checkpoint_json_first_and_leaves_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", *FILES, *CHECKPOINT)
    remote = RemoteFolder(f"file://{tmp_path}/remote")
    remote.upload(tmp_path / "run")
    remove(tmp_path / "run", *CHECKPOINT)
    deleted: list[str] = []
    real = LocalFileSystem.rm_file

    def record(self: Any, path: str) -> None:
        deleted.append(Path(path).name)
        real(self, path)

    monkeypatch.setattr(LocalFileSystem, "rm_file", record)
    remote.upload(tmp_path / "run")
    assert deleted == ["checkpoint.json", "state.safetensors"]
    assert not (tmp_path / "remote/checkpoints/round-000002").exists()


def test_an_interrupted_upload_leaves_no_checkpoint_to_download(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", *FILES, *CHECKPOINT)
    real = MemoryFileSystem.put_file

    def full(self: Any, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        if rpath.endswith("checkpoint.json"):
            raise OSError("quota exceeded\nmore lines")
        real(self, lpath, rpath, *args, **kwargs)

    remote = RemoteFolder(URI)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", full)
        with pytest.raises(RunError) as caught:
            remote.upload(tmp_path / "run")
    assert str(caught.value) == (
        f"--out: {URI} could not be written (quota exceeded); the local folder {tmp_path / 'run'} has everything, "
        "and --resume uploads again"
    )
    assert CHECKPOINT[0] in remote.files()
    RemoteFolder(URI).download(tmp_path / "again")
    assert set(contents(tmp_path / "again")) == set(FILES)
    remote.upload(tmp_path / "run")
    assert set(remote.files()) == {*FILES, *CHECKPOINT}


def test_a_checkpoint_pruned_during_the_upload_stays_incomplete(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of a sweep may prune while the sweep's folder is uploaded."""
    write(tmp_path, *FILES, *CHECKPOINT)
    real = MemoryFileSystem.put_file

    def prune(self: Any, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        if rpath.endswith("state.safetensors"):
            Path(lpath).unlink()
        real(self, lpath, rpath, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", prune)
    remote = RemoteFolder(URI)
    remote.upload(tmp_path)
    assert set(remote.files()) == set(FILES)


def test_a_file_written_during_the_listing_precedes_its_checkpoint(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *FILES)
    real = os.walk

    def walk(top: Path) -> Iterator[Any]:
        found = list(real(top))
        write(tmp_path, "clients/4/round-000002.safetensors", *CHECKPOINT)
        yield from found

    monkeypatch.setattr("rayfed.storage.os.walk", walk)
    remote = RemoteFolder(URI)
    remote.upload(tmp_path)
    assert set(remote.files()) == {*FILES, "clients/4/round-000002.safetensors"}
    remote.upload(tmp_path)
    assert CHECKPOINT[1] in remote.files()


def test_hidden_files_stay_on_their_side(memory: Any, tmp_path: Path) -> None:
    write(tmp_path / "run", "config.yaml", ".config.yaml.7.partial", "checkpoints/.round-000002.7.partial/x")
    remote = RemoteFolder(URI)
    remote.upload(tmp_path / "run")
    assert list(memory.store) == ["/bucket/runs/one/config.yaml"]
    memory.store["/bucket/runs/one/../../../evil"] = memory.store["/bucket/runs/one/config.yaml"]
    remote.download(tmp_path / "a/b/c/again")
    assert contents(tmp_path / "a") == {"b/c/again/config.yaml": b"this is config.yaml"}


def test_links_are_not_uploaded(memory: Any, tmp_path: Path) -> None:
    write(tmp_path, "secret", "run/config.yaml")
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "secret")
    RemoteFolder(URI).upload(tmp_path / "run")
    assert list(memory.store) == ["/bucket/runs/one/config.yaml"]


def test_a_missing_local_folder_deletes_nothing(memory: Any, tmp_path: Path) -> None:
    write(tmp_path / "run", *CHECKPOINT)
    remote = RemoteFolder(URI)
    remote.upload(tmp_path / "run")
    remote.upload(tmp_path / "nothing")
    assert set(remote.files()) == set(CHECKPOINT)


def test_a_download_that_fails_leaves_nothing(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", *FILES)
    remote = RemoteFolder(URI)
    remote.upload(tmp_path / "run")

    def fail(self: Any, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).write_text("half")
        raise RuntimeError  # without a message

    monkeypatch.setattr(MemoryFileSystem, "get_file", fail)
    with pytest.raises(UserError, match=rf"^--out: got '{URI}', but it cannot be read \(RuntimeError\)$"):
        remote.download(tmp_path / "again")
    assert list((tmp_path / "again").iterdir()) == []


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ls(*_: Any, **__: Any) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(UserError, match=r"but it cannot be read \(denied\)"):
        RemoteFolder(f"file://{tmp_path}").files()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    remote = RemoteFolder(f"file://{tmp_path}/file")
    assert remote.files() == {}
    with pytest.raises(UserError, match=r"but it cannot be written \(.*File exists"):
        remote.check_writable()
    remote = RemoteFolder(f"file://{tmp_path}/good")
    remote.check_writable()
    assert list((tmp_path / "good").iterdir()) == []


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--out: got 'nosuch://x/y', but it cannot be opened \(Protocol not known: n"):
        RemoteFolder("nosuch://x/y")


@pytest.mark.parametrize(
    ("uri", "package"), [("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("abfss://c@account.dfs/x", "adlfs")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, uri: str, package: str) -> None:
    from fsspec.registry import _registry

    for protocol in ("s3", "gs", "abfss"):
        monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(UserError, match=rf"but it cannot be opened \(.*nstall {package}") as caught:
        RemoteFolder(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://AKIA:sec/r@et@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIA@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIA:se?ret@bucket/x", "s3://***@bucket/x"),
        ("S3://bucket/x?secret=1", "S3://bucket/x?***"),
        ("gs://token@bucket/x", "gs://***@bucket/x"),
        ("abfss://box:secret@account.dfs.core.windows.net/x", "abfss://***@account.dfs.core.windows.net/x"),
        ("abfss://box@account.dfs.core.windows.net/x?sig=secret", "abfss://***@account.dfs.core.windows.net/x?***"),
        ("ftp://me:secret@host:21/x", "ftp://***@host:21/x"),
        ("http://token@host/x", "http://***@host/x"),
        ("https://me:secret@host/x?key=secret", "https://***@host/x?***"),
        ("simplecache::s3://AKIA:secret@bucket/x", "simplecache::s3://***@bucket/x"),
    ],
)
def test_credentials_are_masked_and_refused_without_being_shown(uri: str, shown: str) -> None:
    assert masked(uri) == shown
    for refuse in (refuse_credentials, RemoteFolder):
        with pytest.raises(UserError, match="the URI has a password, a key or a query string") as caught:
            refuse(uri)
        assert not any(word in str(caught.value) for word in ("AKIA", "secret", "token", "host", "bucket"))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/me@example.org/run",
        "s3://bucket/2024-01-01T10:00@x",
        "ftp://me@host:21/x",
        "abfss://box@account.dfs.core.windows.net/x",
        "hdfs://host:9000/x",
        "file:///home/me@work/x",
        URI,
    ],
)
def test_uris_without_credentials_pass(uri: str) -> None:
    refuse_credentials(uri)
    assert masked(uri) == uri.replace("//me@host", "//***@host").replace("box@", "***@")


def test_names() -> None:
    assert is_uri(URI)
    assert not is_uri("runs/one")
    assert not is_uri(None)
    assert local_folder(URI) == Path("runs/memory-bucket-runs-one-ee7b7109")
    assert slug("a b/c: d.") == "a-b-c-d"
    assert slug("..") == "run"
    assert slug("x" * 300) == "x" * 100
    assert len(slug("ü" * 300).encode()) == 100


def test_uris_with_equal_slugs_have_folders_of_their_own() -> None:
    assert slug("memory://a/b") == slug("memory://a-b")
    assert local_folder("memory://a/b") != local_folder("memory://a-b")


@pytest.mark.parametrize(
    "uri",
    [
        "abfss://:KEY@account/x", "ftp://me:KEY@host/x", "ftp://me%3AKEY@host/x", "ftp://me:K E\nKEY@host/x",
        "sftp://:KEY@host/x", "webdav://me:KEY@host", "oci://b@n/x?KEY=1",
    ],
)  # fmt: skip
def test_no_scheme_shows_credentials_in_any_text(uri: str) -> None:
    assert "KEY" not in masked(f"data.path: got {uri!r}, but there is no such file; did you mean x?")
    assert "KEY" not in masked(f"config: got {str(Path(uri))!r}, but there is no such file")
    with pytest.raises(UserError, match="the URI has a password") as caught:
        refuse_credentials(uri)
    assert "KEY" not in str(caught.value)


def test_text_around_a_uri_stays() -> None:
    assert masked("did you mean s3://b/x? no") == "did you mean s3://b/x?*** no"
    for text in ("got 'memory://bucket/x', but who? a: b", "mail me@example.org: now", "http://127.0.0.1:8265 is gone"):
        assert masked(text) == text


def test_errors_of_storage_libraries_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ls(*_: Any, **__: Any) -> None:
        raise PermissionError("ftp://me:KEY@host/x?sig=KEY is denied")

    monkeypatch.setattr(MemoryFileSystem, "find", ls)
    with pytest.raises(UserError, match=r"but it cannot be read \(ftp://\*\*\*@host/x\?\*\*\* is denied\)"):
        RemoteFolder(URI).files()
    with pytest.raises(RunError, match=r"could not be written \(ftp://\*\*\*@host"):
        RemoteFolder(URI).upload(Path(__file__).parent / "golden")
