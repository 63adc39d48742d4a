"""What clients get: personal accuracy, one figure a client; and the accuracy on clients that never took part.

Personal accuracy is comparable between shared and personal models:

    a_k = sum_y n_k(y) c_k(y) / sum_y n_k(y),    c_k(y): accuracy of client k's model on the test rows of class y

n_k(y) counts client k's own training rows of class y. So a_k estimates how well its model serves data like its own, and
no client's data are split further. With `partition.sequence` these are its rows of the round's experience. Client k's
model is the one from which it would start the next round: what it receives of the global model (truncated, masked), or
a model of its own (FedSA-LoRA's metric is the mean of a_k). Classes without test rows are left out of both sums.
Derived; with one shared model and equal class shares, a_k is balanced accuracy.

A client that never took part has rows on which nobody has trained, drawn from its own distribution: labels and texts.
The global model's accuracy on all such rows is the accuracy on unparticipating clients; how far it is below the
accuracy on participating ones is the participation gap (Yuan et al. 2022, arXiv 2110.14216).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from rayfed.clients.messages import SplitName
from rayfed.clients.plan import RunPlan
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.evaluate import KEYS, Model, evaluate, metrics
from rayfed.server.executor import Executor
from rayfed.server.sampling import cohort_of
from rayfed.tasks.base import Metric
from rayfed.tasks.metrics.single_label import SPREAD

QUANTILES = (10, 50, 90)  # percent of the clients


def client_metrics(plan: RunPlan, state: Any, t: int, executor: Executor) -> dict[str, Metric]:
    """Every client's a_k, and their mean and spread over the clients with data, after round ``t`` (from 0).

    Keys: `test/accuracy_per_client`, a list by client id with None for a client without an a_k;
    `test/accuracy_clients`, the mean, and `test/accuracy_clients_p10`, `..._p50`, `..._p90`, `..._std`, `..._worst`,
    the mean of the lowest tenth (rounded up); `eval/accuracy_clients`, the mean with the validation rows in place of
    the test rows, by which rates can be chosen.
    """
    accuracies = client_accuracies(plan, state, t, executor)
    known = {split: own[~np.isnan(own)] for split, own in accuracies.items()}
    found: dict[str, Metric] = {
        f"{KEYS[split]}/accuracy_clients": float(own.mean()) if len(own) else None for split, own in known.items()
    }
    on_test, spread = np.sort(known["test"]), dict[str, Metric].fromkeys(SPREAD)
    if len(on_test):
        spread |= {f"p{q}": float(np.percentile(on_test, q)) for q in QUANTILES}
        spread |= {"std": float(on_test.std()), "worst": float(on_test[: math.ceil(len(on_test) / 10)].mean())}
    found |= {f"test/accuracy_clients_{name}": value for name, value in spread.items()}
    found["test/accuracy_per_client"] = [None if np.isnan(a) else a for a in accuracies["test"].tolist()]
    return found


def unseen_metrics(plan: RunPlan, model: Model, t: int, executor: Executor) -> dict[str, Metric]:
    """The global ``model`` on the training rows of the clients that are in no cohort up to round ``t`` (from 0).

    Keys: `test/loss_unseen` and `test/accuracy_unseen` (or the task's metric); None where there are no such clients.
    """
    federation = plan.federation
    seen = {c for s in range(t + 1) for c in cohort_of(plan, s)}
    owners = np.repeat(np.arange(federation.clients), federation.sizes)
    rows = np.sort(federation.rows[~np.isin(owners, list(seen))])
    outputs = evaluate(executor, federation, {"": model}, ("train",), plan.eval.batch_size, rows={"train": rows})
    found = metrics(plan.task, federation, outputs, ("",), ("train",))
    return {f"test/{name}_unseen": found[f"train/{name}"] for name in ("loss", plan.task.metric) if name}


def client_accuracies(plan: RunPlan, state: Any, t: int, executor: Executor) -> dict[SplitName, np.ndarray]:
    """a_k (clients,) on the test rows, and the same on the validation rows, from 0 to 1.

    nan for a client without data, or without rows in the split of any of its classes.
    """
    federation = plan.federation_at(t)
    downlink = Downlink(plan, state, t + 1, executor)
    sizes, labels = federation.sizes, federation.train.labels
    groups: dict[Hashable, list[int]] = {}  # clients that have the same model
    for client in np.flatnonzero(sizes).tolist():
        tier = plan.profiles.profile(client, int(sizes[client]), t).tier
        groups.setdefault(client if plan.method.personal else tier, []).append(client)
    splits: tuple[SplitName, ...] = ("validation", "test")
    accuracies = {split: np.full(federation.clients, np.nan) for split in splits}
    classes = len(federation.classes)
    for clients in groups.values():
        first = plan.profiles.profile(clients[0], int(sizes[clients[0]]), t)
        counts = [np.bincount(labels[federation.rows_of(c)], minlength=classes) for c in clients]
        wanted = tuple(np.flatnonzero(np.sum(counts, axis=0)).tolist())
        model = downlink.of(first).model()
        downlink.forget(first)
        size, seen = plan.eval.batch_size, plan.seen_classes(t)
        outputs = evaluate(executor, federation, {"": model}, splits, size, wanted, seen=seen)
        for (_, split), found in outputs.items():
            truth = found.labels.numpy().astype(np.int64)
            right = found.predictions.numpy() == truth
            count = np.bincount(truth, minlength=classes)
            rates = np.bincount(truth[right], minlength=classes) / np.maximum(count, 1)
            for client, own in zip(clients, counts, strict=True):
                weights = own * (count > 0)
                if weights.sum():
                    accuracies[split][client] = float(weights @ rates / weights.sum())
    return accuracies
