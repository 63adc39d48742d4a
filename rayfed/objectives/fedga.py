"""FedGA (AAAI 2025, arXiv 2412.16582): soft targets that align the gradients of frequent and of rare classes.

  z: logits (C,); y: label; n_c: rows of class c in the client's batch; p = softmax(z), without gradient

  t_c  = 1[c = y] + p_c (1 - n_c / n_y)        1 at c = y; entries may be negative; not normalised
  loss = -sum_c t_c log softmax(z)_c           mean over the batch

  gradient, with S = sum_c t_c:   p_c (S - 1 + n_c / n_y) for c != y,   p_y S - 1 for c = y

With equal counts of all classes the loss is the plain cross-entropy. The authors' code averages clients uniformly
(`server.weights: uniform`) and clips gradients to norm 5 (`client.clip_norm: 5`); neither is set here.

Source: authors' code read; deviates: weights and clipping are settings of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rayfed.objectives.base import Objective, RowContext


@dataclass(frozen=True)
class FedGA(Objective):
    """Cross-entropy with aligned soft targets, for tasks of one class a row."""

    counts: Literal["batch", "client"] = "batch"
    """Where rows are counted: in the client's `batch`, as in the authors' code, or in all its training rows."""

    def rows(self, logits: Tensor, labels: Tensor, slots: Tensor, context: RowContext) -> Tensor:
        counts = (context.batch_counts if self.counts == "batch" else context.class_counts)[slots]
        ratios = counts / counts.gather(1, labels[:, None])
        logs = logits.log_softmax(1)
        targets = logs.detach().exp() * (1 - ratios)
        return -(targets.scatter(1, labels[:, None], 1.0) * logs).sum(1)
