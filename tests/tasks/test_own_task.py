"""A task of the user's own, by its import path in a config or as an object, in runs and in `load_model`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rayfed
from rayfed.errors import UserError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_task

    return own_task


def settings(example: Any, source: str) -> dict[str, Any]:
    return {**example.SETTINGS, "data": {"source": source}, "server": {"rounds": 2, "cohort": 3}}


def test_a_task_by_its_import_path_is_the_object(tmp_path: Path, example: Any) -> None:
    by_path = rayfed.run(settings(example, "own_task:SineRegression"), tmp_path / "path")
    task = example.SineRegression()
    by_object = rayfed.run(settings(example, "stdlib"), tmp_path / "object", task=task)
    assert list(by_path.history["state/digest"]) == list(by_object.history["state/digest"])
    assert rayfed.run(by_path.out / "config.yaml", by_path.out, resume=True).rounds == 2
    found = [rayfed.load_model(result.out, task=task)(torch.ones(1, 1)) for result in (by_path, by_object)]
    assert torch.equal(*found)
    sys.modules.pop("own_task")
    with pytest.raises(UserError, match=r"^run: got .*comes from own_task:SineRegression: load_model\(run, task=...\)"):
        rayfed.load_model(by_path.out)
    assert "own_task" not in sys.modules


class NeedsWords(rayfed.Task):
    def __init__(self, words: int) -> None:
        self.words = words


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "own_task",
            "data.source: got 'own_task', but it should be stdlib, files, hub, lowrank, object or an import path",
        ),
        ("flies", r"data.source: got 'flies', but it should be .* package.module:Class; did you mean files\?"),
        ("own_task:", "data.source: got 'own_task:', but it should be"),
        ("no_module:Task", "data.source: got 'no_module:Task', but no_module cannot be imported"),
        ("own_task:Net", "data.source: got 'own_task:Net', but that is no subclass of rayfed.tasks.base.Task"),
        (
            f"{__name__}:NeedsWords",
            "data.source: got .*, but NeedsWords needs arguments .*: override from_settings, or",
        ),
    ],
)
def test_a_wrong_import_path_is_refused(tmp_path: Path, example: Any, source: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        rayfed.run(settings(example, source), tmp_path / "run")


def test_a_model_of_another_task_is_refused(tmp_path: Path, example: Any, tiny: Any) -> None:
    out = rayfed.run(settings(example, "own_task:SineRegression"), tmp_path / "run").out
    with pytest.raises(
        UserError, match=r"^task: got 'rayfed.*:TextClassification', but the run's model comes from own_"
    ):
        rayfed.load_model(out, task=rayfed.TextClassification())
    with pytest.raises(UserError, match=r"^task: got 7, but it is an object of a subclass of rayfed.Task"):
        rayfed.load_model(out, task=7)  # type: ignore[arg-type]
    named = rayfed.run(tiny("server.rounds=1"), tmp_path / "named").out
    with pytest.raises(UserError, match=r"^task: got 'SineRegression', but the run's model comes from /"):
        rayfed.load_model(named, task=example.SineRegression())
    rayfed.load_model(named, task=rayfed.TextClassification())
