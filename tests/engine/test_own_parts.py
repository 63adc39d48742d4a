"""A method and a task from outside the package: by import path or as objects, the same bits in process and on Ray."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from small_runs import lowrank

import rayfed
from rayfed.config import load_config
from rayfed.errors import RunError
from rayfed.methods.fedit import FedIT
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.low_rank_regression import LinearModel, NumberRows
from rayfed.tasks.models.base import FrozenBase

SOURCE = '''
from dataclasses import dataclass

from rayfed.methods.fedit import FedIT


@dataclass(frozen=True)
class {name}(FedIT):
    """FedIT, but with a share of every step."""

    share: float = {share}

    def aggregate(self, state, updates, advance):
        moved = super().aggregate(state, updates, advance)
        return moved.next(vector=state.vector + self.share * (moved.vector - state.vector))
'''
ON_RAY = ("engine.kind=ray", "engine.workers=2")


@dataclass(frozen=True)
class HalfSteps(FedIT):
    """FedIT, but with a share of every step."""

    share: float = 0.5

    def aggregate(self, state, updates, advance):
        moved = super().aggregate(state, updates, advance)
        return moved.next(vector=state.vector + self.share * (moved.vector - state.vector))


def digests(*overrides, out, **parts):
    return [record["state/digest"] for record in rayfed.run(lowrank(*overrides), out=out, **parts).metrics]


@pytest.fixture(scope="module")
def half_steps(tmp_path_factory):
    return digests(out=tmp_path_factory.mktemp("half") / "run", method=HalfSteps())


def test_a_method_object_of_a_test_module(tmp_path, ray_cluster, half_steps):
    assert half_steps != digests(out=tmp_path / "fedit")
    assert digests(*ON_RAY, out=tmp_path / "run", method=HalfSteps()) == half_steps
    section = load_config(tmp_path / "run" / "config.yaml").method
    assert (section.name.rpartition(":")[2], section.options) == ("HalfSteps", {"share": 0.5})


def test_a_method_by_its_import_path(tmp_path, monkeypatch, ray_cluster, half_steps):
    """The workers cannot import its module: its code travels with the run."""
    (tmp_path / "methods_by_path.py").write_text(SOURCE.format(name="MyMethod", share=1.0))
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = ("method.name=methods_by_path:MyMethod", "method.share=0.5")
    assert digests(*mine, out=tmp_path / "local") == half_steps
    assert digests(*mine, *ON_RAY, out=tmp_path / "ray") == half_steps
    sys.modules.pop("methods_by_path")


@dataclass(frozen=True)
class LinearMedian(Task):
    """Each client has numbers on a line of its own; the loss is the absolute error, and more is better in `near`."""

    clients: int = 6
    metric = "near"

    def check(self, *, lora, server, eval, engine):
        pass

    def load_data(self):
        draw = np.random.default_rng(1)
        features = draw.normal(size=(8 * self.clients, 6)).astype(np.float32)
        rows = NumberRows(features, features[:, ::-1].copy())
        return Federation(
            rows, rows, rows, classes=("only",), rows=np.arange(len(rows)), starts=np.arange(self.clients + 1) * 8
        )

    def load_base(self, federation):
        return FrozenBase(LinearModel(6, 6), ())

    def loss(self, outputs, labels):
        errors = (outputs - labels).abs()
        return errors.sum(1), torch.full((len(errors),), 6.0)

    def metrics(self, predictions, labels, federation):
        return {"near": float(((predictions - labels).abs() < 0.5).float().mean())}

    def metric_names(self):
        return ("near",)


def test_a_task_object(tmp_path, ray_cluster):
    here = rayfed.run(lowrank(), out=tmp_path / "here", task=LinearMedian())
    there = rayfed.run(lowrank(*ON_RAY), out=tmp_path / "there", task=LinearMedian())
    for a, b in zip(here.metrics, there.metrics, strict=True):
        for key in ("state/digest", "train/loss", "eval/loss", "eval/near", "test/near", "bytes/total"):
            assert a[key] == b[key]
    assert 0 <= here.metrics[-1]["test/near"] <= 1
    assert here.metrics[-1]["eval/loss"] < here.metrics[0]["eval/loss"]
    assert here.summary["final/test_near"] == here.metrics[-1]["test/near"]


@dataclass(frozen=True)
class Impatient(FedIT):
    """Stops after the first update that it gets."""

    sum_in_worker = False

    def aggregate(self, state, updates, advance):
        return super().aggregate(state, [next(iter(updates))], advance)


@dataclass(frozen=True)
class ImpatientSum(Impatient):
    sum_in_worker = True


@pytest.mark.parametrize("method", [Impatient(), ImpatientSum()], ids=lambda method: type(method).__name__)
def test_a_method_that_ends_before_its_last_update_ends_the_run(tmp_path, method):
    name = type(method).__name__
    with pytest.raises(RunError, match=rf"^method\.name: {name}\.aggregate ended before it took every update$"):
        rayfed.run(lowrank("engine.pack=2", "server.cohort=4"), out=tmp_path / "run", method=method)
