"""The squared distance between two low-rank products, and a pull by it: what FedBC adds where products are averaged.

Nothing here has the size of a layer's weights: a distance costs r^2 (in + out) for rank r.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.device import to_device
from rayfed.lora.adapter import LowRank
from rayfed.objectives.base import Objective


@dataclass(frozen=True)
class ProductPull(Objective):
    """A client's pull towards its start in the space of products: ``weight`` times the squared distance."""

    weight: float
    start: Sequence[LowRank]
    """The pair of every adapted layer, in model order, on the CPU."""

    def penalty(self, factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        squares = [product_square(B, A, start) for (B, A), start in zip(factors, self.start, strict=True)]
        return self.weight * torch.stack(squares).sum() if squares else None


def product_square(B: Tensor, A: Tensor, start: LowRank) -> Tensor:
    """||s (B A - B_z A_z)||_F^2 without a matrix of the layer's size. Ranks above those of ``start`` are zero."""
    B_z, A_z = (to_device(t, B.device).to(B.dtype) for t in (start.B, start.A))
    B, A = B[:, : start.rank], A[: start.rank]
    # (B - B_z) A + B_z (A - A_z): the difference of two products would cancel near the start.
    left, right = torch.cat([B - B_z, B_z], 1), torch.cat([A, A - A_z])
    return start.scale**2 * ((left.mT @ left) * (right @ right.mT)).sum()
