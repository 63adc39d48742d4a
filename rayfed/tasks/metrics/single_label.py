"""The loss and the metrics of classification: a row has one label."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rayfed.tasks.base import Metric

if TYPE_CHECKING:
    from rayfed.config.training import Eval

LISTS = ("recall_per_class", "confusion_matrix")
"""The metrics that are not one number."""
NAMES = ("accuracy", "macro_f1", *LISTS)
"""The names of the `metrics`."""
SPREAD = ("p10", "p50", "p90", "std", "worst")
"""What is known of the accuracies over the clients, beside their mean: see `rayfed.server.evaluation.per_client`."""


def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropies (rows,) in nats, ones (rows,)), of ``logits`` (rows, classes) and ``labels`` (rows,)."""
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses, torch.ones_like(losses)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor]:
    """(sums (rows,), counts (rows,)): the cross-entropies with label smoothing and class weights, as in `Task.loss`.

    ``weights`` (rows, classes) are those of the classes at each row's client; None: all are 1. The sum over the sum of
    counts is torch's CrossEntropyLoss(weight=, label_smoothing=) of the client's rows.
    """
    losses = -logits.log_softmax(-1)
    losses = losses if weights is None else losses * weights
    own = losses.gather(1, labels[:, None]).squeeze(1)
    counts = torch.ones_like(own) if weights is None else weights.gather(1, labels[:, None]).squeeze(1)
    return (1 - smoothing) * own + smoothing * losses.mean(1), counts


def balanced(counts: Tensor) -> Tensor:
    """(K, classes): the weights of the classes, given how many rows (K, classes) of each the clients have.

    n / (C n_c), with n the client's rows and C the number of its classes, as in scikit-learn. The mean over the
    client's rows is 1. Classes that the client lacks have weight 0.
    """
    present = counts > 0
    weights = counts.sum(1, keepdim=True) / (present.sum(1, keepdim=True) * counts).clamp(min=1)
    return weights * present


def metrics(predictions: Tensor, labels: Tensor, classes: int) -> dict[str, Metric]:
    """Scores from 0 to 1 of the predicted classes (n,) and the labels (n,), and the confusion matrix in rows."""
    from torchmetrics.functional import classification as functional  # takes a second to import

    confusion = functional.multiclass_confusion_matrix(predictions, labels, classes)
    rows = confusion.sum(1).tolist()
    recalls = functional.multiclass_recall(predictions, labels, classes, average=None).tolist()
    return {
        "accuracy": int(confusion.trace()) / len(labels),
        "macro_f1": float(functional.multiclass_f1_score(predictions, labels, classes, average="macro")),
        "recall_per_class": [recall if count else None for recall, count in zip(recalls, rows)],
        "confusion_matrix": confusion.tolist(),
    }


def comparable(keys: Iterable[str], eval: Eval) -> tuple[str, ...]:
    """Those of a task's ``keys`` that hold one number, and what else a run measures, see `Task.metric_keys`."""
    more = {f"test/accuracy_clients_{part}": eval.clients for part in SPREAD}
    more |= {"test/accuracy_clients": eval.clients, "eval/accuracy_clients": eval.clients}
    more |= {"test/accuracy_unseen": eval.unseen}
    numbers = (key for key in keys if not any(name in key for name in LISTS))
    return (*numbers, *(key for key, measured in more.items() if measured))
