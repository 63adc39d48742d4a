"""The page of a sweep: written by itself, with the sweep's table, its maps, and the best of each method."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rayfed
from rayfed.cli.run import sweep as sweep_command
from rayfed.errors import RunError
from rayfed.reports import read
from rayfed.reports.drawing import drawing
from rayfed.reports.heat_map import MOST_CELLS, draw, heat_maps
from rayfed.reports.sweep_page import write_sweep_page
from rayfed.reports.table import methods
from rayfed.tracking import Table

Write = Callable[..., Path]


@pytest.fixture
def sweep(writer: Write, tmp_path: Path) -> Path:
    """Two methods at three rates and two seeds, and the table of the sweep. fedit is best at 0.01, flasc at 0.1."""
    out = tmp_path / "sweep"
    for method, scores in (("fedit", (0.5, 0.7, 0.6)), ("flasc", (0.3, 0.4, 0.8))):
        for lr, score in zip((0.001, 0.01, 0.1), scores):
            for seed in (0, 1):
                overrides = (
                    f"method.name={method}",
                    f"client.lr={lr}",
                    f"seed={seed}",
                    f"lora.rank={4 if lr < 0.1 else 8}",
                )
                found = [score - 0.1, score + seed / 50]
                name = f"name={method},lr={lr},seed={seed}"
                writer(name, *overrides, eval=found, test=[1 - x for x in found], folder=out / "trials")
    (out / "table.txt").write_text("the table <of> the sweep\n  seeds & all\n")
    return out


def texts(out: Path) -> str:
    page = (out / "report.html").read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n")
    return " ".join("".join(ET.fromstring(page).itertext()).split())


def test_the_page_of_a_sweep_has_its_table_and_the_best_of_each_method(sweep: Path) -> None:
    write_sweep_page(sweep)
    said = texts(sweep)
    assert "sweep: 6 settings compared, 12 runs" in said
    assert "The sweep the table <of> the sweep seeds & all" in said
    for title in ("Two settings at a time", "client.lr and rank, fedit", "Best of each method"):
        assert title in said
    table = methods(read([sweep]))
    assert table.columns == ("", "best setting", "MB both ways", "validation accuracy", "test accuracy")
    assert [(row[0], row[3], row[4]) for row in table.rows] == [
        ("flasc", "81.0 ± 1.4 %", "19.0 ± 1.4 %"),
        ("fedit", "71.0 ± 1.4 %", "29.0 ± 1.4 %"),  # on validation, though the test is better elsewhere
    ]
    assert not (sweep / "figures").exists()


def test_a_map_has_cells_for_grids_and_points_for_draws(writer: Write, tmp_path: Path) -> None:
    def grid(name: str, pairs: Any) -> Any:
        folders = [
            writer(f"{name}{i}", f"client.lr={lr}", f"lora.rank={rank}", eval=[0.1 + i / 100], folder=tmp_path)
            for i, (lr, rank) in enumerate(pairs)
        ]
        comparison = read(folders)
        (found,) = heat_maps(comparison)
        with drawing():
            return found, draw(comparison, found).axes[0]

    cells, axes = grid("grid", [(lr, rank) for lr in (1e-2, 9e-4, 1.0) for rank in (16, 2)])
    assert (cells.name, cells.title, cells.has_points) == ("client-lr-rank", "client.lr and rank", False)
    assert (cells.x.texts, cells.y.texts) == (["2", "16"], ["0.0009", "0.01", "1"])  # ascending, as numbers
    assert [label.get_text() for label in axes.get_yticklabels()] == cells.y.texts
    assert len(axes.patches) == 6
    points, axes = grid("draw", [(0.001 * 3**i, (2, 4, 8, 16)[i * 7 % 4]) for i in range(12)])
    assert points.has_points
    assert len(axes.lines) == 12
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_an_axis_of_many_values_has_points(writer: Write, tmp_path: Path) -> None:
    folders = [
        writer(f"{lr}-{rank}", f"client.lr={lr}", f"lora.rank={rank}", folder=tmp_path)
        for lr in range(1, MOST_CELLS + 2)
        for rank in (2, 4)
    ]
    assert [grid.has_points for grid in heat_maps(read(folders))] == [True]
    assert [grid.has_points for grid in heat_maps(read(folders[:-2]))] == [False]


def test_settings_that_rise_together_are_one_axis(writer: Write, tmp_path: Path) -> None:
    """The scale follows the rank; rounds are no axis."""
    folders = []
    for rank in (2, 4):
        for lr in (0.1, 0.2):
            overrides = f"lora.rank={rank}", f"lora.alpha={2 * rank}", f"client.lr={lr}"
            folders.append(
                writer(f"{rank}-{lr}", *overrides, eval=[0.5] * (1 + ((rank == 2) != (lr == 0.1))), folder=tmp_path)
            )
    (grid,) = heat_maps(read(folders))
    assert {grid.x.name, grid.y.name} == {"rank", "client.lr"}


@pytest.mark.parametrize("way", ["command", "python"])
def test_a_sweep_that_has_ended_has_its_page(
    sweep: Path, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayfed.sweeps import sweep as sweeps

    monkeypatch.setattr("rayfed.reports.run_page.write_report", lambda comparison, out, files: pages.append(out))
    pages: list[Path] = []
    result = sweeps.SweepResult(sweep, [{"trial": "a", "status": "failed"}], Table("", (), ()))
    monkeypatch.setattr(sweeps, "run_sweep", lambda *_, **__: result)
    if way == "python":
        assert rayfed.sweep("some.yaml") is result
    else:
        with pytest.raises(RunError, match="1 of 1 trials did not finish"):  # the page is there nevertheless
            sweep_command("some.yaml", [], None, False)
    assert pages == [sweep]


def test_a_page_that_fails_does_not_fail_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trials").mkdir()
    write_sweep_page(tmp_path)
    assert "rayfed: no report.html: UserError: DIR: got" in capsys.readouterr().err
    assert "no report.html: UserError" in (tmp_path / "events.log").read_text()
