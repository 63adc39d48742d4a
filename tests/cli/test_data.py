"""`rayfed data`: what it prints fits 80 columns, on a terminal and in a pipe; it writes nothing but the figure."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from small_runs import lowrank

from rayfed.cli import main
from rayfed.config import dump_config


@pytest.fixture
def config(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config of 12 clients and 4 classes, in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(dump_config(tiny()))
    return "config.yaml"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["data", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_figures_and_heat_map_of_classes(config: str, capsys) -> None:
    lines = printed(capsys, config)
    assert max(map(len, lines)) <= 80
    assert [path.name for path in Path().iterdir()] == [config]
    assert "  rows                128 train, 32 validation, 60 test" in lines
    table = {line[:15].strip(): line[15:].split() for line in lines if len(line.split()) >= 7}
    assert table["total variation"][-1] < table["total variation"][2]  # IID clients of these sizes differ less
    assert "all clients, most rows first; a class a column" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("client rows"))
    rows = [int(line.split()[1]) for line in lines[start + 1 :]]
    assert sum(rows) == 128
    assert rows == sorted(rows, reverse=True)


def test_natural_clients_have_their_names(config: str, capsys) -> None:
    lines = printed(capsys, config, "partition.kind=natural", "data.client=owner")
    assert {line.split()[0] for line in lines if line.startswith("user")} == {f"user{i}" for i in range(7)}


def test_many_classes_and_clients_fit_the_terminal(config: str, capsys) -> None:
    rows = "".join(
        f'{{"text": "a", "label": "a class with a long name {i % 150}", "who": "client {i:020}"}}\n' for i in range(900)
    )
    Path("train.jsonl").write_text(rows)
    for more in (["partition.clients=400"], ["partition.kind=natural", "data.client=who"]):
        lines = printed(capsys, config, "data.path=train.jsonl", *more)
        assert max(map(len, lines)) <= 80
        assert any(line.startswith("24 of ") and line.endswith("4 classes a column") for line in lines)


def test_a_terminal_gets_a_table_and_colours_of_80_columns(config: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = printed(capsys, config)
    assert max(map(len, lines)) > 80  # with the colours
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert max(map(len, shown)) <= 80
    assert any(line.startswith("│ total variation │") for line in shown)


def test_the_known_answer_has_rows_and_the_distance_of_optima(tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(lowrank("problem.shift=0.25", "problem.condition=1")))
    lines = printed(capsys, str(path))
    (line,) = [line for line in lines if line.startswith("optimum distance ")]
    assert 0.2 < float(line.split()[5]) < 0.3
    assert not any("iid" in line or line.startswith("client ") for line in lines)


def test_the_figure_is_written_and_a_wrong_name_is_refused(config: str, capsys) -> None:
    assert printed(capsys, config, "--svg", "figures/data.svg")[-1] == "figure figures/data.svg"
    assert Path("figures/data.svg").read_text().startswith("<svg xmlns=")
    assert main(["data", config, "--svg", "data.png"]) == 2
    assert capsys.readouterr().err == "rayfed: --svg: got 'data.png', but the name of the figure's file ends in .svg\n"
    Path("file").write_text("")
    assert main(["data", config, "--svg", "file/data.svg"]) == 2
    assert capsys.readouterr().err.startswith("rayfed: --svg: got 'file/data.svg', but it cannot be written: ")


def test_bad_data_are_refused_as_by_a_run(config: str, capsys) -> None:
    assert main(["data", config, "server.cohort=13"]) == 2
    assert capsys.readouterr().err.startswith("rayfed: server.cohort: got 13, but ")
