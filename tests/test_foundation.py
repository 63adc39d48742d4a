"""What every part stands on: keyed draws, files written whole, errors that a user can act on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from rayfed import seeding
from rayfed.errors import RunError, UserError, allowed, first_line
from rayfed.files import atomic_path, atomic_write, write_json

# keys


def test_keys_differ_wherever_their_parts_do() -> None:
    named = [
        (0, "cohort"),
        (1, "cohort"),
        (0, "batch"),
        (0, "cohort", 1),
        (0, "cohort", "1"),
        (0, "cohort", 1, 2),
        (0, "cohort", 2, 1),
        (0, "cohort", 12),
        (0, "cohort", "a", "bc"),
        (0, "cohort", "ab", "c"),
        (0, "cohort", "abc"),
        (0, "cohort", ""),
        (0, "cohort", "", ""),
        (0, "cohorta", "bc"),
        (-1, "cohort"),
    ]
    assert len({seeding.derive_seed(*parts) for parts in named}) == len(named)


def test_keys_never_change() -> None:
    # Golden: other values would make every published digest and result unreproducible.
    assert seeding.derive_seed(0, "cohort", 0) == 1517145588248376779
    assert seeding.derive_seed(7, "batch", 3, "layer.0", 2) == 6138653475516758108


def test_keys_have_63_bits_and_use_them() -> None:
    drawn = [seeding.derive_seed(0, "range", i) for i in range(2000)]
    assert all(0 <= key < 2**63 for key in drawn)
    assert len(set(drawn)) == len(drawn)
    assert max(drawn) > 2**62 > min(drawn)


def test_generators_belong_to_their_key_and_not_to_what_was_drawn_before() -> None:
    first = seeding.numpy_rng(0, "a", 1).random(4).tolist()
    seeding.numpy_rng(0, "b", 1).random(100)
    assert seeding.numpy_rng(0, "a", 1).random(4).tolist() == first != seeding.numpy_rng(0, "a", 2).random(4).tolist()


def test_torch_generators_leave_the_global_one_alone() -> None:
    import torch

    before = torch.random.get_rng_state()
    one, same, two = (torch.rand(4, generator=seeding.torch_rng(0, "a", i)) for i in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, two)
    assert torch.equal(torch.random.get_rng_state(), before)


# files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_replaces_a_folder_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_path(path) as temporary:
            (temporary / "sub").mkdir(parents=True)
            (temporary / "sub" / content).write_text(content)
    assert names(path / "sub") == ["new"]
    assert names(tmp_path) == ["folder"]


def test_an_error_of_the_disk_names_the_file_also_where_a_library_has_errors_of_its_own(tmp_path: Path) -> None:
    class RustError(Exception):
        pass

    path, full = tmp_path / "a.txt", "No space left on device"
    for error in (OSError(28, full), OSError(28, full, f"{tmp_path}/.a.txt"), RustError(f"I/O: {full} (os error 28)")):
        with pytest.raises(OSError, match=f"^{re.escape(f'[Errno 28] {full}: {str(path)!r}')}$"), atomic_path(path):
            raise error
    elsewhere = FileNotFoundError(2, "No such file", "/elsewhere/b")
    with pytest.raises(FileNotFoundError, match="/elsewhere/b"), atomic_path(path):
        raise elsewhere


def test_a_failed_block_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (path / "old").mkdir(parents=True)

    def fail() -> None:
        with atomic_path(path) as temporary:
            (temporary / "half").mkdir(parents=True)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_block_that_makes_nothing_fails_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_text() == "old"


def test_what_a_killed_process_left_does_not_get_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_path(path) as temporary:
        leftover = temporary
        temporary.mkdir()
    leftover.mkdir()
    (leftover / "stale").touch()  # the same process number, another life
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "fresh").touch()
    assert names(path) == ["fresh"]
    assert names(tmp_path) == ["folder"]


def test_text_is_utf8_and_bytes_are_bytes(tmp_path: Path) -> None:
    atomic_write(tmp_path / "text", "Zoë\n")
    atomic_write(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "Zoë\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "facts.json", {"b": 1, "a": [0.5, None]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "facts.json", {"a": [value]})
    assert json.loads((tmp_path / "facts.json").read_text()) == {"a": [0.5, None], "b": 1}
    assert names(tmp_path) == ["facts.json"]


# errors


def test_a_refusal_names_the_field_the_value_and_what_is_allowed() -> None:
    assert str(allowed("server.cohort", 11, "there are only 10 clients")) == (
        "server.cohort: got 11, but there are only 10 clients"
    )


def test_the_first_line_of_an_error() -> None:
    assert first_line(OSError("\n  disk full \nat byte 9")) == "disk full"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(ValueError("abc"), limit=2) == "ab"


def test_bad_input_is_a_value_error_and_a_broken_run_is_not() -> None:
    assert issubclass(UserError, ValueError)
    assert issubclass(RunError, RuntimeError)
    assert not issubclass(RunError, ValueError)


def test_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    """Others read adapters and checkpoints on a shared disk, whatever the library that wrote them."""
    (plain := tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        for name in ("a", "b"):
            (temporary / name).write_text("")
            (temporary / name).chmod(0o600)
    assert {entry.stat().st_mode for entry in (tmp_path / "folder").iterdir()} == {plain.stat().st_mode}
