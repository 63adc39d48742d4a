"""The loss and the metric of regression: mean squared error, and Spearman's rank correlation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(squared errors (rows,), ones (rows,)), of ``outputs`` (rows, 1) and ``targets`` (rows,)."""
    errors = (outputs.squeeze(1) - targets).square()
    return errors, torch.ones_like(errors)


def spearman(predictions: Tensor, targets: Tensor) -> float | None:
    """The correlation of the ranks of predictions (n,) and targets (n,), -1 to 1; equal values share their mean rank.

    None where all predictions are equal, or all targets.
    """
    x, y = (ranks - ranks.mean() for ranks in map(_ranks, (predictions, targets)))
    norms = float(x.square().sum()) * float(y.square().sum())
    return float(x @ y) / math.sqrt(norms) if norms else None


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, the mean of them where values are equal."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)  # ascending
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]
