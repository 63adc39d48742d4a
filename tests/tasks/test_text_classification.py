"""The metrics of text classification against ten lines of NumPy, and the same from any number of workers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import CLASSIFICATION

from rayfed.api import prepare
from rayfed.engine.local_executor import LocalExecutor
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.server.evaluation.evaluate import evaluate, metrics
from rayfed.tasks.data.federation import Federation


def expected(predicted: np.ndarray, truth: np.ndarray, classes: int) -> dict:
    confusion = np.zeros((classes, classes), int)
    for p, y in zip(predicted, truth):
        confusion[y, p] += 1
    hits, rows, columns = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    f1 = [2 * hits[c] / (rows[c] + columns[c]) for c in range(classes) if rows[c] + columns[c]]
    return {
        "accuracy": (predicted == truth).mean(),
        "macro_f1": np.mean(f1),
        "recall_per_class": [hits[c] / rows[c] if rows[c] else None for c in range(classes)],
        "confusion_matrix": confusion.tolist(),
    }


def check(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert found["confusion_matrix"] == wanted["confusion_matrix"]
    assert [r is None for r in found["recall_per_class"]] == [r is None for r in wanted["recall_per_class"]]
    for found_recall, recall in zip(found["recall_per_class"], wanted["recall_per_class"]):
        assert found_recall == (None if recall is None else pytest.approx(recall, rel=1e-6))
    assert (found["accuracy"], found["macro_f1"]) == pytest.approx((wanted["accuracy"], wanted["macro_f1"]), rel=1e-6)


@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_metrics_are_those_of_the_definitions(classes, pairs):
    predicted, truth = (np.array(column) % classes for column in zip(*pairs))
    federation = Federation(None, None, None, tuple(map(str, range(classes))), None, None)
    found = CLASSIFICATION.metrics(torch.tensor(predicted), torch.tensor(truth), federation)
    assert tuple(found) == CLASSIFICATION.metric_names()
    check(found, expected(predicted, truth, classes))


class Shuffled(LocalExecutor):
    """Results in the reverse order, as the fastest workers may give them."""

    def run(self, submissions):
        yield from reversed(list(super().run(submissions)))


def test_shards_of_workers_give_the_metrics_of_one_pass(tiny):
    plan = prepare(tiny())
    g = torch.Generator().manual_seed(4)
    layers = {
        name: LowRank(torch.randn(out, 4, generator=g), torch.randn(4, inner, generator=g), 0.2)
        for name, (out, inner) in plan.model.shapes.items()
    }
    adapter = Adapter(layers, {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in plan.model.head.items()})
    model = {"": (adapter.flatten(), adapter.layout)}
    found = []
    for batch in (3, 1000):
        executor = Shuffled(replace(plan, eval=plan.eval.model_copy(update={"batch_size": batch})))
        outputs = evaluate(executor, plan.federation, model, ("validation", "test"), batch)
        executor.close()
        found.append(metrics(plan.task, plan.federation, outputs, [""], ["validation", "test"]))
        split = outputs["", "test"]
        assert split.labels.tolist() == plan.federation.test.labels.tolist()
        own = {key.removeprefix("test/"): value for key, value in found[-1].items() if key.startswith("test/")}
        assert own.pop("loss") == split.loss / split.count
        check(own, expected(split.predictions.numpy(), split.labels.numpy(), 4))
    shards, whole = found
    assert 0 < whole["test/accuracy"] < 1
    assert {key: value for key, value in shards.items() if "loss" not in key} == {
        key: value for key, value in whole.items() if "loss" not in key
    }
    assert shards["test/loss"] == pytest.approx(whole["test/loss"], rel=1e-6)


def test_a_split_without_rows_has_no_metrics(tiny):
    plan = prepare(tiny("data.validation=0"))
    found = metrics(plan.task, plan.federation, {}, [""], ["validation"])
    assert found == dict.fromkeys(
        f"eval/{name}" for name in ("loss", "accuracy", "macro_f1", "recall_per_class", "confusion_matrix")
    )
