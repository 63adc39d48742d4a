"""The loss and the metrics of multi-label tasks, for texts and images: a row has any number of labels, also none.

A model gives a row one logit a label. A label is predicted where its logit is above 0: its probability is above 1/2.

Shape suffixes: N rows, L labels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

NAMES = ("map", "micro_f1", "macro_f1")
"""The names of the `metrics`."""


def first_class(labels_NL: np.ndarray) -> np.ndarray:
    """(N,): the first of a row's labels, in the order of their numbers; L for a row without any."""
    found: np.ndarray = np.where(labels_NL.any(1), labels_NL.argmax(1), labels_NL.shape[1])
    return found


def loss(logits_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
    """(sums (N,), counts (N,)): each row's binary cross-entropy in nats, summed over its labels, and their number L.

    So a client's loss is the mean over the rows and labels of its batch, as in torch's BCEWithLogitsLoss.
    ``labels_NL``: 1 or true where the row has the label, otherwise 0.
    """
    targets = labels_NL.to(logits_NL.dtype)
    losses = nn.functional.binary_cross_entropy_with_logits(logits_NL, targets, reduction="none")
    sums = losses.sum(1)
    return sums, torch.full_like(sums, logits_NL.shape[1])


def metrics(logits_NL: Tensor, labels_NL: Tensor) -> dict[str, float | None]:
    """Scores from 0 to 1, as scikit-learn computes them; N is at least 1.

    - `map`: mean average precision, the mean of the labels' average precision over the labels that some row has; None
      where no row has a label. Average precision is the sum of (R_n - R_{n-1}) P_n, with recall R_n and precision P_n
      of the rows whose logit is at least the n-th largest distinct one (`average_precision_score`).
    - `micro_f1`: the F1 of all pairs of a row and a label together.
    - `macro_f1`: the mean of the labels' F1. It is 0 for a label that no row has and no prediction names.
    """
    predicted_NL, true_NL = logits_NL > 0, labels_NL.bool()
    hits, named, present = (x.sum(0).double() for x in (predicted_NL & true_NL, predicted_NL, true_NL))
    known = present > 0
    precisions = [
        _average_precision(logits_NL[:, label], true_NL[:, label]) for label in known.nonzero().flatten().tolist()
    ]
    return {
        "map": sum(precisions) / len(precisions) if precisions else None,
        "micro_f1": float(_f1(hits.sum(), named.sum() + present.sum())),
        "macro_f1": float(_f1(hits, named + present).mean()),
    }


def _f1(hits: Tensor, total: Tensor) -> Tensor:
    """2 hits / (predicted + true); 0 where that is 0 / 0."""
    return 2 * hits / total.clamp(min=1)


def _average_precision(logits_N: Tensor, true_N: Tensor) -> float:
    """Of one label that at least one row has. Rows with equal logits count together."""
    order = logits_N.argsort(descending=True)
    logits_N, hits_N = logits_N[order], true_N[order].double().cumsum(0)
    last = torch.cat([logits_N[1:] != logits_N[:-1], torch.ones(1, dtype=torch.bool)]).nonzero().flatten()
    hits, rows = hits_N[last], last + 1
    gains = torch.diff(hits, prepend=torch.zeros(1, dtype=hits.dtype))
    return float((gains / hits[-1] * hits / rows).sum())
