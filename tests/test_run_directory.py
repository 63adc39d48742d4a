"""The lock on a run directory, default names, what a directory may contain, and errors of its disk in one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayfed import run_directory
from rayfed.errors import RunError, UserError
from rayfed.run_directory import check_out, disk_errors, lock_alone, locked, locked_out, share_lock

USED = "but another process is using it"


@contextmanager
def other_process(folder: Path, shared: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock until its stdin is closed."""
    code = (
        f"from pathlib import Path; from rayfed.run_directory import locked\n"
        f"with locked(Path({str(folder)!r}), shared={shared}): print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def elsewhere(folder: Path, **options: bool | float) -> BaseException | None:
    """The error of another thread that locks the folder, or None."""

    def lock() -> None:
        with locked(folder, **options):
            pass

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lock).exception()


def test_another_process_is_refused_in_one_line_and_comes_in_when_the_first_has_died(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        with pytest.raises(UserError) as caught, locked(tmp_path):
            pass
        assert str(caught.value) == f"--out: got {str(tmp_path)!r}, {USED}"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(elsewhere, tmp_path, wait=20)
            process.kill()
            assert waiting.result() is None


def test_a_thread_may_lock_again_and_other_threads_may_not(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path):
            assert USED in str(elsewhere(tmp_path))
        assert USED in str(elsewhere(tmp_path))  # the inner block ended nothing
    assert elsewhere(tmp_path) is None


def test_a_shared_lock_keeps_others_out_until_the_last_one_ends(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert USED in str(elsewhere(tmp_path, shared=True))
        share_lock(tmp_path)
        with other_process(tmp_path, shared=True) as driver:
            assert not lock_alone(tmp_path)
            assert USED in str(elsewhere(tmp_path))
            driver.kill()
            driver.wait()
            assert lock_alone(tmp_path)
            assert USED in str(elsewhere(tmp_path, shared=True))


def test_an_empty_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "a/b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a/b") as folder:
        (folder / "file").touch()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"a", "mine"}


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_its_last_user_removes_is_made_and_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    real = run_directory._lock

    def late(handle: int, kind: int, folder: Path, deadline: float) -> bool:
        monkeypatch.setattr(run_directory, "_lock", real)
        folder.rmdir()
        if again:
            folder.mkdir()  # by a third process
        return real(handle, kind, folder, deadline)

    monkeypatch.setattr(run_directory, "_lock", late)
    with locked(tmp_path / "run") as folder:
        assert folder.is_dir()
        assert USED in str(elsewhere(folder))


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr("rayfed.run_directory.fcntl.flock", flock)
    with locked(tmp_path):
        assert not lock_alone(tmp_path)
        assert elsewhere(tmp_path) is None


def test_default_names_of_one_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayfed.run_directory.time.strftime", lambda _: "now")
    with locked_out(None, "a", False) as first, locked_out(None, "a", False) as second, locked_out(None, "a", False):
        assert (str(first), str(second)) == ("runs/a-now", "runs/a-now-2")
        assert {path.name for path in Path("runs").iterdir()} == {"a-now", "a-now-2", "a-now-3"}
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("", "it should name a folder"),
        ("a\0b", "it cannot be used as a folder (embedded null byte)"),
        ("x" * 300, "it cannot be used as a folder (File name too long)"),
        ("file/run", "file is a file"),
        ("dangling", "dangling is a link to nothing"),
        ("/proc/run", "it cannot be used as a folder (No such file or directory)"),
    ],
)
def test_a_folder_that_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(UserError) as caught, locked_out(out, "a", False):
        pass
    assert str(caught.value) == f"--out: got {out!r}, but {why}"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("rayfed.run_directory.tempfile.TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"cannot be used as a folder \(Read-only file system\)$"):
        check_out(tmp_path, False, "run", "config.yaml")


def test_what_killed_processes_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.7.partial").write_text("half")
    for resume in (False, True):
        assert not check_out(tmp_path, resume, "run", "config.yaml")
    (tmp_path / ".git").mkdir()
    with pytest.raises(UserError, match="it is not empty"):
        check_out(tmp_path, False, "run", "config.yaml")


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "clients/3"])
def test_links_in_a_run_directory_are_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/latest-run").symlink_to("nowhere")
    assert check_out(tmp_path, True, "run", "config.yaml")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path.parent)
    with pytest.raises(UserError, match=f"but .*/{name} is a link; a run directory has no links$"):
        check_out(tmp_path, True, "run", "config.yaml")


def test_errors_of_the_disk_are_one_line_and_a_closed_pipe_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught, disk_errors(tmp_path):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "a"))
    assert str(caught.value) == f"{tmp_path}/a: Disk quota exceeded; --resume continues from the last checkpoint"
    with pytest.raises(RunError, match=f"^{tmp_path}: Input/output error; "), disk_errors(tmp_path):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(BrokenPipeError), disk_errors(tmp_path):
        raise BrokenPipeError
