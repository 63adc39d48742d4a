"""What each client gets out of it: one accuracy a client, comparable between shared and personal models.

    a_k = sum_y n_k(y) c_k(y) / sum_y n_k(y),    c_k(y): accuracy of client k's model on the test rows of class y

n_k(y) counts client k's own training rows of class y, so a_k estimates how well its model serves data like its own; no
client's data are split further for it. Its model is what it would start the next round from: what it receives of the
global model (truncated, masked), or a model of its own (FedSA-LoRA's metric is the mean of a_k). Classes without test
rows are left out of both sums. Derived; with one shared model and equal class shares, a_k is balanced accuracy.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from rayfed.config import Experiment
from rayfed.methods import Method
from rayfed.profiles.client_profiles import profile
from rayfed.server.downlink import Downlink, received_model
from rayfed.server.evaluation.evaluate import Evaluation
from rayfed.server.executor import Executor, results
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.federation import Federation

QUANTILES = (10, 50, 90)  # percent of the clients


def client_metrics(
    method: Method, state: Any, experiment: Experiment, federation: Federation, t: int, executor: Executor
) -> dict[str, float | None]:
    """Mean and quantiles over the clients with data of what each gets of ``state``, after round ``t`` (from 0).

    Keys: `test/accuracy_clients` and `test/accuracy_clients_p10`, `..._p50`, `..._p90`.
    """
    each = client_accuracies(method, state, experiment, federation, t, executor)
    known = each[~np.isnan(each)]
    metrics: dict[str, float | None] = {"test/accuracy_clients": float(known.mean()) if len(known) else None}
    for q in QUANTILES:
        metrics[f"test/accuracy_clients_p{q}"] = float(np.percentile(known, q)) if len(known) else None
    return metrics


def client_accuracies(
    method: Method, state: Any, experiment: Experiment, federation: Federation, t: int, executor: Executor
) -> np.ndarray:
    """a_k (clients,), from 0 to 1; nan for a client without data, or without test rows of any of its classes."""
    downlink = Downlink(method, state, experiment.wire.down.values, executor)
    assert isinstance(federation.train, Tokens)  # `eval.clients` asks for classes
    sizes, labels = federation.sizes, federation.train.labels
    alike: dict[Hashable, list[int]] = {}  # clients that have the same model
    for client in np.flatnonzero(sizes).tolist():
        own = profile(client, int(sizes[client]), experiment, t)
        alike.setdefault(client if method.personal else own.tier, []).append(client)
    accuracies = np.full(federation.clients, np.nan)
    for clients in alike.values():
        first = profile(clients[0], int(sizes[clients[0]]), experiment, t)
        counts = [np.bincount(labels[federation.rows_of(c)]) for c in clients]
        wanted = tuple(sorted({int(y) for held in counts for y in np.flatnonzero(held)}))
        models = {"": received_model(downlink.of(first))}
        downlink.forget(first)
        evaluation = Evaluation.of(executor, federation, models, ("test",), experiment.eval.batch_size, wanted)
        found = evaluation.sums(results(executor.run(evaluation.tasks)))["", "test"]
        correct, count = found.correct.numpy(), found.count.numpy()
        for client, held in zip(clients, counts, strict=True):
            weights = held * (count[: len(held)] > 0)
            if weights.sum():
                rates = correct[: len(held)] / np.maximum(count[: len(held)], 1)
                accuracies[client] = float(weights @ rates / weights.sum())
    return accuracies
