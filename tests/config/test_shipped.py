"""The configs that come with rayfed are found by name, and a path goes before a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfed.config import load_config
from rayfed.config.shipped import find_config, folder, shipped, summary
from rayfed.errors import UserError

ROOT = Path(__file__).parents[2]


def test_every_config_has_a_name_of_its_own_and_starts_with_one_line_about_it() -> None:
    files = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "kubernetes"]
    assert sorted(shipped().values()) == sorted(files)
    for path in files:
        assert 20 < len(summary(path)) < 200


def test_a_name_is_found_from_any_folder_and_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("lowrank") == load_config(ROOT / "configs" / "lowrank.yaml")
    assert find_config("pbt") == folder() / "sweeps" / "pbt.yaml"
    (tmp_path / "lowrank").write_text("name: mine\n")
    assert load_config("lowrank").name == "mine"


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (
            "quickstrat",
            "there is no such file; did you mean quickstart\\? configs that come with rayfed are banking77, ",
        ),
        ("missing.yaml", "there is no such file$"),
        ("folder/lowrank", "there is no such file$"),
    ],
)
def test_an_unknown_name_is_refused(given: str, answer: str) -> None:
    with pytest.raises(UserError, match=f"^config: got '{given}', but {answer}"):
        load_config(given)
