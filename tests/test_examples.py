"""The examples run, and each is short."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import rayfed
from rayfed.errors import UserError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_own_data(tmp_path: Path, tiny_bert: Path) -> None:
    history = import_module("own_data").main(str(tiny_bert), str(tmp_path / "run")).history
    assert list(history["test/error"]) == pytest.approx(list(1 - history["test/accuracy"]))


def test_step_by_step(tmp_path: Path) -> None:
    history = import_module("step_by_step").main(str(tmp_path / "run")).history
    assert 3 < len(history) <= 10
    assert list(history.index) == list(range(1, len(history) + 1))


def test_own_method(tmp_path: Path) -> None:
    assert len(import_module("own_method").main(str(tmp_path / "run")).history) == 10


def test_own_task(tmp_path: Path) -> None:
    example = import_module("own_task")
    result = rayfed.run(example.SETTINGS, tmp_path / "run", task=example.SineRegression())
    history = result.history
    assert history["eval/loss"].iloc[-1] < 0.3 * history["eval/loss"].iloc[0]
    task = example.SineRegression()
    model, test = rayfed.load_model(result.out, task=task), task.load_data().test
    batch = test.batch(np.arange(len(test)), padded=True)
    with torch.no_grad():
        near = task.metrics(model(batch["features"]), batch["labels"], task.load_data())["near"]
    assert near == history["test/near"].iloc[-1]
    for other in (None, example.SineRegression(clients=9), rayfed.TextClassification()):
        with pytest.raises(UserError, match=r"comes from .*own_task:SineRegression"):
            rayfed.load_model(result.out, task=other)


def test_tune_search(tmp_path: Path, ray_cluster: None) -> None:
    example = import_module("tune_search")
    results = example.search(str(tmp_path))
    assert results.num_errors == 0
    assert {result.metrics["round"] for result in results} <= {2, 4, 6}
    results = example.population(str(tmp_path))
    assert [result.metrics["round"] for result in results] == [6, 6]
    assert any((Path(result.path) / "continues.json").is_file() for result in results)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
