"""The W&B workspace uses only names that runs log, and every name is in the JSON that W&B stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import rayfed
from rayfed.cli import main
from rayfed.config import Experiment
from rayfed.config.describe import iter_fields
from rayfed.tracking.workspace import SECTIONS, Curves, Panel, Parallel, build, definition

ROOT = Path(__file__).parents[2]
PANELS = [panel for panels in SECTIONS.values() for panel in panels]
needs_package = pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="wandb-workspaces is not installed")


def names(panel: Panel) -> tuple[str, ...]:
    """The names that the panel shows: metrics, values of the summary, settings as `config:KEY`."""
    if isinstance(panel, Curves):
        return panel.x, *panel.y
    if isinstance(panel, Parallel):
        return panel.columns
    return tuple(name for name in (panel.x, panel.y, panel.color) if name is not None)


@pytest.fixture(scope="module")
def written(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """(metrics of a round, values of a summary) of two small runs, one of them on the known-answer problem."""
    folder = tmp_path_factory.mktemp("runs")
    texts = tiny(
        "server.rounds=2",
        "eval.every=2",
        "eval.subset=8",
        "wire.down.density=0.5",
        "wire.up.density=0.5",
        "eval.clients=true",
    )
    overrides = ["server.rounds=1", "engine.kind=local", "tracking.console=off", "tracking.wandb=off"]
    known = rayfed.load_config(ROOT / "configs" / "lowrank.yaml", overrides)
    results = [rayfed.run(texts, out=folder / "texts"), rayfed.run(known, out=folder / "known")]
    rounds = {key for result in results for record in result.metrics for key in record if record[key] is not None}
    return rounds, {key for result in results for key, value in result.summary.items() if value is not None}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_panels_name_only_what_exists(panel: Any, written: tuple[set[str], set[str]]) -> None:
    rounds, summary = written
    settings = {f"config:{key}" for key, _ in iter_fields(Experiment)}
    exists = (
        rounds if isinstance(panel, Curves) else settings | summary | rounds
    )  # W&B copies the last round to the summary
    assert set(names(panel)) - exists == set()


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str):
        yield value


def spelled(name: str, panel: Any) -> str:
    """The name as W&B stores it: `section.value.key` for a setting, `summary:name` for a value of the summary."""
    if name.startswith("config:"):
        return name.replace(".", ".value.", 1)
    return name if isinstance(panel, Curves) else f"summary:{name}"


@needs_package
def test_every_name_is_in_the_definition_that_wandb_stores() -> None:
    made = definition(build("project", "entity"))
    json.dumps(made)
    sections = made["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    for section, panels in zip(sections, SECTIONS.values(), strict=True):
        assert len(section["panels"]) == len(panels)
        for stored, panel in zip(section["panels"], panels, strict=True):
            assert {panel.title, *(spelled(name, panel) for name in names(panel))} <= set(leaves(stored))


@needs_package
def test_the_command_writes_the_definition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "workspace.json"
    assert main(["workspace", "--project", "p", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"definition {out}\n"
    assert json.loads(out.read_text())["project"] == "p"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--save"], "--entity: needed with --save"),
        (["--save", "--entity", "me"], "--save: needs a login"),
        (["--out", "."], "--out: got '.', but that is a folder"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["workspace", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rayfed: {line}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    assert main(["workspace", "--out", str(tmp_path / "x.json")]) == 2
    assert "pip install -e '.[workspace]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
