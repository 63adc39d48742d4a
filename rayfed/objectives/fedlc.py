"""FedLC (Zhang et al. 2022, arXiv 2209.00189): logits calibrated by how many rows of each class the client has.

  z: logits (C,); y: label; n_c: the client's training rows of class c, counted once, over all of them

  s_c  = z_c - tau n_c^(-1/4)                  n_c = 0: s_c = -inf, the class is left out
  loss = -log( e^{s_y} / sum_c e^{s_c} )       denominator: all      gradient softmax(s) - onehot(y)
  loss = -log( e^{s_y} / sum_{c != y} e^{s_c} )  denominator: others   gradient -1 at y, softmax over the others

  server   unchanged; evaluation uses z

A class that the client lacks gets no gradient, so its row of the head stays as it was sent; this holds for tau = 0 too.
With equal counts of all classes the loss is the plain cross-entropy. The counts never leave the client.

`denominator: others` is the paper's formula as three readers quote it. Its gradient at y never vanishes and it has no
lower bound, so long training diverges. All published implementations train with `all`.

Source: secondary; deviates: the default has the true class in the denominator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rayfed.config.types import NonNegative
from rayfed.objectives.base import Objective, RowContext


@dataclass(frozen=True)
class FedLC(Objective):
    """Cross-entropy of calibrated logits, for tasks of one class a row."""

    tau: NonNegative = 1.0
    """Strength of the calibration. Implementations use 0.1 to 1."""
    denominator: Literal["all", "others"] = "all"
    """The classes in the denominator of the softmax: all that the client has, or only the `others` than the row's own.
    With `others`, a row has loss 0 where its client has no other class.
    """

    def rows(self, logits: Tensor, labels: Tensor, slots: Tensor, context: RowContext) -> Tensor:
        counts = context.class_counts
        shifts = self.tau * counts.clamp(min=1) ** -0.25
        calibrated = (logits - shifts[slots]).masked_fill((counts == 0)[slots], -torch.inf)
        if self.denominator == "all":
            return cross_entropy(calibrated, labels, reduction="none")
        own = calibrated.gather(1, labels[:, None])
        others = calibrated.scatter(1, labels[:, None], -torch.inf)
        sums = others.logsumexp(1, keepdim=True)
        return (sums - own).masked_fill(sums == -torch.inf, 0.0).squeeze(1)
