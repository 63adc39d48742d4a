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


def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropies (rows,) in nats, ones (rows,)), of ``logits`` (rows, classes) and ``labels`` (rows,)."""
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses, torch.ones_like(losses)


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
    more = {"test/accuracy_clients": eval.clients, "test/accuracy_unseen": eval.unseen}
    numbers = (key for key in keys if not any(name in key for name in LISTS))
    return (*numbers, *(key for key, measured in more.items() if measured))
