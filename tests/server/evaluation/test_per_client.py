"""The accuracy of each client against its definition: its own model, one row at a time, weighted by its own classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyarrow import parquet

import rayfed
from rayfed.api import prepare
from rayfed.engine.local_executor import LocalExecutor
from rayfed.lora.packed.segments import Segment
from rayfed.lora.packed.stack import Stack
from rayfed.server.evaluation import per_client, targets
from rayfed.server.evaluation.evaluate import evaluate
from rayfed.server.evaluation.per_client import client_accuracies, unseen_metrics

SETTINGS = ("eval.clients=true", "client.lr=0.5", "client.optimizer=adamw", "client.epochs=2", "server.cohort=6")


@pytest.fixture
def seen(monkeypatch):
    """The arguments and the result of every call: the states of a run and its clients' accuracies."""
    calls = []

    def spy(*arguments):
        calls.append((arguments, client_accuracies(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(per_client, "client_accuracies", spy)
    return calls


def predictions(plan, adapters, split="test"):
    """Each adapter's predictions on the split, one text at a time."""
    federation, base = plan.federation, plan.task.load_base(plan.federation)
    rows = federation.split(split)
    stack = Stack(base.model, plan.model.shapes, base.head)
    found = []
    for adapter in adapters:
        stack.load([adapter])
        found.append(np.zeros(len(rows), np.int64))
        for row in range(len(rows)):
            batch = rows.batch(np.array([row]), padded=True)
            batch.pop("labels")
            with torch.no_grad(), stack.using([Segment(0, 1, None, [int(rows.lengths[row])])]):
                found[-1][row] = int(base.model(**batch).logits.argmax())
    return found


def expected(federation, predicted_by_client, split="test"):
    """sum_y n_k(y) c_k(y) / sum_y n_k(y), written out."""
    labels = federation.split(split).labels
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
    ((arguments, by_split),) = seen
    each = by_split["test"]
    plan, state = arguments[:2]
    federation = plan.federation
    holders = np.flatnonzero(federation.sizes).tolist()
    personal = method == "fedsa"
    models = [plan.method.own(state, c) for c in holders] if personal else [state.layout.unflatten(state.vector)]

    def by_client(split):
        predicted = predictions(plan, models, split)
        each_own = predicted if personal else predicted * len(holders)
        return expected(federation, dict(zip(holders, each_own, strict=True)), split)

    wanted, validated = by_client("test"), by_client("validation")
    assert each[holders].tolist() == pytest.approx(wanted, abs=1e-12)
    assert np.isnan(np.delete(each, holders)).all()
    record = result.metrics[-1]
    assert record["test/accuracy_per_client"] == [None if np.isnan(value) else value for value in each.tolist()]
    assert record["test/accuracy_clients"] == pytest.approx(np.mean(wanted))
    assert record["test/accuracy_clients_p10"] == pytest.approx(np.percentile(wanted, 10))
    assert record["test/accuracy_clients_std"] == pytest.approx(np.std(wanted))
    tenth = -(-len(wanted) // 10)
    assert record["test/accuracy_clients_worst"] == pytest.approx(sum(sorted(wanted)[:tenth]) / tenth)
    assert result.summary["final/test_accuracy_clients"] == record["test/accuracy_clients"]
    assert record["eval/accuracy_clients"] == pytest.approx(np.mean(validated))
    assert "test/accuracy_clients" not in result.metrics[0]
    if method == "fedsa":  # a client's own head knows its own classes
        assert record["test/accuracy_clients"] > record["test/accuracy"]


def test_clients_of_a_tier_share_its_model(tiny, tmp_path, seen, monkeypatch):
    measured = []
    monkeypatch.setattr(per_client, "evaluate", lambda *a, **more: measured.append(a[2]) or evaluate(*a, **more))
    overrides = ("method.name=flexlora", "profiles.kind=tiers", "profiles.ranks=[1,4]", "server.rounds=1")
    rayfed.run(tiny(*SETTINGS, *overrides), out=tmp_path / "run")
    assert len(measured) == 2


def test_classes_without_test_rows_are_left_out(tiny):
    plan = prepare(tiny(*SETTINGS))
    federation, state = plan.federation, plan.method.init(plan.start(), plan.seed)
    federation.test.labels[federation.test.labels == 0] = 1
    owner = int(np.argmax(federation.sizes))
    federation.train.labels[federation.rows_of(owner)] = 0
    executor = LocalExecutor(plan)
    each = client_accuracies(plan, state, 0, executor)["test"]
    executor.close()
    assert np.isnan(each[owner])
    others = [client for client in np.flatnonzero(federation.sizes).tolist() if client != owner]
    (predicted,) = predictions(plan, [state.layout.unflatten(state.vector)])
    assert each[others].tolist() == pytest.approx(expected(federation, dict.fromkeys(others, predicted)), abs=1e-12)


def test_unseen_rows_are_those_of_clients_that_never_took_part(tiny, tmp_path, monkeypatch):
    arguments = []
    monkeypatch.setattr(targets, "unseen_metrics", lambda *given: arguments.append(given) or unseen_metrics(*given))
    settings = ("eval.unseen=true", "eval.every=2", "server.rounds=3", "server.cohort=4")
    result = rayfed.run(tiny(*settings), out=tmp_path / "run")
    plan, federation = arguments[0][0], arguments[0][0].federation
    sent = parquet.read_table(result.out / "ledger.parquet").to_pylist()
    for given, t in zip(arguments, (1, 2), strict=True):
        seen = {row["client"] for row in sent if row["round"] <= t + 1}
        rows = [row for c in federation.holders.tolist() if c not in seen for row in federation.rows_of(c)]
        vector, layout = given[1]
        predicted = predictions(plan, [layout.unflatten(vector)], "train")[0][rows]
        accuracy = float((predicted == federation.train.labels[rows]).mean())
        assert result.metrics[t]["test/accuracy_unseen"] == pytest.approx(accuracy)
        assert result.metrics[t]["test/loss_unseen"] > 0
    assert result.summary["final/test_accuracy_unseen"] == result.metrics[-1]["test/accuracy_unseen"]
    assert not any("unseen" in key for key in result.metrics[0])


def test_unseen_is_none_once_everybody_took_part(tiny, tmp_path):
    holders = len(prepare(tiny()).federation.holders)
    record = rayfed.run(tiny("eval.unseen=true", f"server.cohort={holders}"), out=tmp_path / "run").metrics[-1]
    assert record["test/accuracy_unseen"] is None
    assert record["test/loss_unseen"] is None
