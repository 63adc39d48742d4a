"""HetLoRA's regulariser (arXiv 2401.06432): it makes the last ranks of a client's adapter small.

penalty = weight * sum over layers of ||B[:, start:]||_F ||A[start:, :]||_F
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.objectives.base import Objective


@dataclass(frozen=True)
class TailPenalty(Objective):
    """Penalises the last ranks of an adapter."""

    weight: float
    """Factor on the penalty; 0 or more."""
    start: int
    """The first rank that is penalised, from 0."""

    def penalty(self, factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        norms = [
            torch.linalg.vector_norm(B[:, self.start :]) * torch.linalg.vector_norm(A[self.start :]) for B, A in factors
        ]
        return self.weight * torch.stack(norms).sum()
