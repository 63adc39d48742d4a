"""Statistics of vectors by class: what a client sends of its features or of its outputs, and the server's mean of them.

C: classes; d: the length of a vector. On the wire they are one vector of numbers: C, the counts (C,), the means of the
classes whose count is not 0, in order, and their variances if they travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassStatistics:
    """Of each class the number of its vectors, their mean and their variance by entry. Zeros if there are none."""

    counts: Tensor
    """(C,) float32, whole numbers."""
    means: Tensor
    """(C, d) float32."""
    variances: Tensor
    """(C, d) float32, of the vectors themselves: the sum of squares is divided by their number."""

    @classmethod
    def of(cls, vectors: Tensor, labels: Tensor, classes: int) -> Self:
        """Those of ``vectors`` (rows, d) with ``labels`` (rows,), which may be empty. Computed in float64."""
        counts = torch.bincount(labels, minlength=classes).double()
        some = counts.clamp(min=1)[:, None]

        def means_of(values: Tensor) -> Tensor:
            return torch.zeros(classes, vectors.shape[1], dtype=torch.float64).index_add_(0, labels, values) / some

        means = means_of(vectors.double())
        variances = means_of((vectors.double() - means[labels]).square())
        return cls(counts.float(), means.float(), variances.float())

    @property
    def known(self) -> Tensor:
        """(C,) bool: the classes that have vectors."""
        return self.counts > 0

    def numbers(self, variances: bool) -> Tensor:
        """What travels, (1 + C + m,) float32, with the variances or without."""
        parts = (self.means, self.variances) if variances else (self.means,)
        count = torch.tensor([float(len(self.counts))])
        return torch.cat([count, self.counts, *(part[self.known].reshape(-1) for part in parts)])

    @classmethod
    def from_numbers(cls, numbers: Tensor, variances: bool) -> Self:
        """The statistics that gave these `numbers`. Without variances these are 0. Without a known class, d is 0."""
        classes = int(numbers[0])
        counts, values = numbers[1 : 1 + classes], numbers[1 + classes :]
        known, parts = counts > 0, 2 if variances else 1
        width = len(values) // max(parts * int(known.sum()), 1)
        found = torch.zeros(2, classes, width)
        found[:parts, known] = values.view(parts, int(known.sum()), width)
        return cls(counts, *found)


def mean_statistics(
    last: ClassStatistics | None, clients: Sequence[ClassStatistics], by_examples: bool
) -> ClassStatistics | None:
    """For each class the mean over those ``clients`` that have it. A class that none of them has stays as in ``last``.

    ``by_examples`` weighs a client by its vectors of the class: then means and variances are those of all the clients'
    vectors together. Otherwise all of them weigh the same. The counts are 1 for a known class and 0 for others: nobody
    learns from them how many rows of a class the clients have. None: no class is known.
    """
    clients = [own for own in clients if own.known.any()]
    if not clients:
        return last
    counts = torch.stack([own.counts for own in clients]).double()
    weights = (counts if by_examples else (counts > 0).double())[:, :, None]
    total, own_means = weights.sum(0), torch.stack([own.means for own in clients]).double()
    mean = (weights * own_means).sum(0) / total.clamp(min=1)
    # A client's spread around the common mean: its own variance, and how far its own mean is from that.
    spread = torch.stack([own.variances for own in clients]).double() + (own_means - mean).square()
    variance = (weights * spread).sum(0) / total.clamp(min=1)
    known = total.squeeze(1) > 0
    found = ClassStatistics(known.float(), mean.float(), variance.float())
    if last is None:
        return found
    means = torch.where(known[:, None], found.means, last.means)
    variances = torch.where(known[:, None], found.variances, last.variances)
    return ClassStatistics((known | last.known).float(), means, variances)
