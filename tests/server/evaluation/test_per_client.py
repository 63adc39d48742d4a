"""What each client gets, against the definition: its own model by PEFT, row by row, weighted like its own classes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rayfed
from rayfed.engine.local_executor import LocalExecutor
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack
from rayfed.methods import build
from rayfed.server.evaluation import per_client
from rayfed.server.evaluation.per_client import client_accuracies
from rayfed.tasks.data.federation import form_federation
from rayfed.tasks.models.base import base_of
from rayfed.tasks.models.spec import describe_model

SETTINGS = ("eval.clients=true", "client.lr=0.5", "client.optimizer=adamw", "client.epochs=2", "server.cohort=6")


@pytest.fixture
def seen(monkeypatch):
    """The arguments and result of every call, by which a run's own states can be looked at."""
    calls = []

    def spy(*arguments):
        calls.append((arguments, client_accuracies(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(per_client, "client_accuracies", spy)
    return calls


def predictions(experiment, federation, adapters):
    """Each adapter's predictions on the test split, one text at a time."""
    base = base_of(experiment, len(federation.classes))
    shapes = describe_model(experiment, len(federation.classes)).shapes
    stack = Stack(base.model, shapes, base.head)
    found = []
    for adapter in adapters:
        stack.load([adapter])
        found.append(np.zeros(len(federation.test), np.int64))
        for row in range(len(federation.test)):
            batch = federation.test.batch(np.array([row]), federation.pad_id)
            batch.pop("labels")
            with torch.no_grad(), stack.batch.using([Segment(0, 1, None, [int(federation.test.lengths[row])])]):
                found[-1][row] = int(base.model(**batch).logits.argmax())
    return found


def expected(federation, predicted_by_client):
    """sum_y n_k(y) c_k(y) / sum_y n_k(y), written out."""
    labels = federation.test.labels
    accuracies = []
    for client, predicted in predicted_by_client.items():
        total = weight = 0.0
        for row in federation.rows_of(client):
            same = labels == federation.train.labels[row]
            if same.any():
                total += float((predicted[same] == labels[same]).mean())
                weight += 1
        accuracies.append(total / weight)
    return accuracies


@pytest.mark.parametrize("method", ["fedit", "fedsa"])
def test_every_clients_own_model_on_data_like_its_own(tiny, tmp_path, seen, method):
    experiment = tiny(*SETTINGS, f"method.name={method}", "server.rounds=2", "eval.every=2")
    result = rayfed.run(experiment, out=tmp_path / "run")
    ((arguments, each),) = seen
    federation, state = form_federation(experiment), arguments[1]
    holders = np.flatnonzero(federation.sizes).tolist()
    if method == "fedsa":
        models = [build("fedsa").own(state, client) for client in holders]
        predicted = predictions(experiment, federation, models)
    else:
        predicted = predictions(experiment, federation, [state.layout.unflatten(state.vector)]) * len(holders)
    wanted = expected(federation, dict(zip(holders, predicted, strict=True)))
    assert each[holders].tolist() == pytest.approx(wanted, abs=1e-12)
    assert np.isnan(np.delete(each, holders)).all()
    record = result.metrics[-1]
    assert record["test/accuracy_clients"] == pytest.approx(np.mean(wanted))
    assert record["test/accuracy_clients_p10"] == pytest.approx(np.percentile(wanted, 10))
    assert result.summary["final/test_accuracy_clients"] == record["test/accuracy_clients"]
    assert "test/accuracy_clients" not in result.metrics[0]
    if method == "fedsa":  # a client's own head knows its own classes
        assert record["test/accuracy_clients"] > record["test/accuracy"]


def test_clients_of_a_tier_share_its_model(tiny, tmp_path, seen, monkeypatch):
    measured = []
    of = per_client.Evaluation.of
    monkeypatch.setattr(per_client, "Evaluation", SimpleNamespace(of=lambda *a: measured.append(a[2]) or of(*a)))
    overrides = ("method.name=flexlora", "profiles.kind=tiers", "profiles.ranks=[1,4]", "server.rounds=1")
    rayfed.run(tiny(*SETTINGS, *overrides), out=tmp_path / "run")
    assert len(measured) == 2


def test_classes_without_test_rows_are_left_out(tiny):
    experiment = tiny(*SETTINGS)
    federation = form_federation(experiment)
    model_spec = describe_model(experiment, len(federation.classes))
    method = build("flasc")
    state = method.init(model_spec.start(experiment), experiment.seed)
    federation.test.labels[federation.test.labels == 0] = 1
    owner = int(np.argmax(federation.sizes))
    federation.train.labels[federation.rows_of(owner)] = 0
    executor = LocalExecutor(experiment, federation, model_spec)
    each = client_accuracies(method, state, experiment, federation, 0, executor)
    executor.close()
    assert np.isnan(each[owner])
    others = [client for client in np.flatnonzero(federation.sizes).tolist() if client != owner]
    (predicted,) = predictions(experiment, federation, [state.layout.unflatten(state.vector)])
    assert each[others].tolist() == pytest.approx(expected(federation, dict.fromkeys(others, predicted)), abs=1e-12)
