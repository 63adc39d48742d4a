"""An exception of the user's own code is one line that names the function, the exception, the file and the line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import lowrank
from torch import Tensor

import rayfed
from rayfed.errors import RunError, UserError
from rayfed.methods.fedit import FedIT
from rayfed.objectives import Plain
from rayfed.tasks.low_rank_regression import LowRankRegression

SETTINGS = lowrank("server.rounds=2")
ON_RAY = {"engine.kind": "ray", "engine.workers": 2}


@cache
def line_of(text: str) -> int:
    """The number of the line of this file that ends with the text."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(text))


class FailingTask(LowRankRegression):
    """Fails in the function of this name."""

    def __init__(self, fails: str) -> None:
        sections = ("problem", "partition", "model", "seed")
        super().__init__(**{name: getattr(SETTINGS, name) for name in sections})
        object.__setattr__(self, "fails", fails)

    def load_data(self) -> Any:
        if self.fails == "load_data":
            raise FileNotFoundError("no rows")  # in load_data
        return super().load_data()

    def load_base(self, federation: Any) -> Any:
        if self.fails == "load_base":
            raise ValueError("no weights")  # in load_base
        return super().load_base(federation)

    def loss(self, outputs: Tensor, labels: Tensor) -> Any:
        if self.fails == "loss":
            outputs @ torch.zeros(1, 7)  # in loss
        return super().loss(outputs, labels)

    def exact_metrics(self, federation: Any, changes: Any) -> Any:
        if self.fails == "exact_metrics":
            {}["a metric"]  # in exact_metrics
        return super().exact_metrics(federation, changes)


@dataclass(frozen=True)
class FailingMethod(FedIT):
    def aggregate(self, state, updates, advance):
        helper(list(updates))


def helper(updates):
    return updates[99]  # in helper


CASES = {
    "load_data": (UserError, "FailingTask.load_data failed: FileNotFoundError: no rows"),
    "load_base": (UserError, "FailingTask.load_base failed: ValueError: no weights"),
    "loss": (RunError, "FailingTask.loss failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    "exact_metrics": (RunError, "FailingTask.exact_metrics failed: KeyError: 'a metric'"),
    "helper": (RunError, "helper failed: IndexError: list index out of range"),
}


def check(name: str, out: Path, *settings: Any) -> None:
    kind, message = CASES[name]
    parts = {"method": FailingMethod()} if name == "helper" else {"task": FailingTask(name)}
    with pytest.raises(kind, match=f"^{re.escape(message)}") as failed:
        rayfed.run(SETTINGS.with_(*settings), out, **parts)
    place = f"{__file__}:{line_of(f'# in {name}')}"
    assert str(failed.value).endswith(f" ({place})")
    assert len(str(failed.value).splitlines()) == 1
    (note,) = failed.value.__notes__
    assert note.startswith("Traceback")
    assert f"# in {name}" in note
    assert "rayfed/engine" not in note
    if kind is RunError:
        log = (out / "events.log").read_text()
        assert log.count(f"# in {name}") == 1
        assert f"{place}); `--resume` continues after round 0" in log


@pytest.mark.parametrize("name", CASES)
def test_a_failure_in_this_process(tmp_path: Path, name: str) -> None:
    check(name, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "exact_metrics", "helper"])
def test_a_failure_on_ray(tmp_path: Path, name: str, ray_cluster: None) -> None:
    check(name, tmp_path / "run", ON_RAY)


def test_a_failure_of_rayfed_itself_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plain, "penalty", 7)
    with pytest.raises(TypeError, match="not callable"):
        rayfed.run(SETTINGS, tmp_path / "run")
