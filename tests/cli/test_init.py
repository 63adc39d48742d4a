"""`rayfed init` lists the configs and copies one, never over a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfed.cli import main
from rayfed.config.shipped import shipped


def test_the_list_has_a_line_for_each_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*shipped()]


def test_a_config_is_copied_once(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "lowrank"]) == 0
    assert capsys.readouterr().out == "config lowrank.yaml\n"
    copy = tmp_path / "lowrank.yaml"
    assert copy.read_bytes() == shipped()["lowrank"].read_bytes()
    copy.write_text("mine")
    assert main(["init", "lowrank"]) == 2
    wanted = "rayfed: NAME: got 'lowrank', but lowrank.yaml exists here already, and is not replaced\n"
    assert capsys.readouterr().err == wanted
    assert copy.read_text() == "mine"


def test_an_unknown_name_is_answered_with_a_similar_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "lowrnk"]) == 2
    assert "but there is no such config; did you mean lowrank? " in capsys.readouterr().err
