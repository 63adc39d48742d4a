"""The distances of a round's global model from two plain averages of the clients' trained models.

    mean of products    D = sum_k p_k (F_k + s_k B_k A_k)                          the average of the clients' models
    product of means    P = sum_k p_k F_k + (sum_k p_k s_k B_k) (sum_k p_k A_k)    the result of averaging factors

with F_k the frozen change of the base under client k's adapter, ranks padded with zeros, p_k the server's weights. The
taxonomy is that of Sum-Product and Product-Sum methods (arXiv 2508.01348). Reported are ``||W - D|| / ||D||`` and
``||W - P|| / ||P||`` over all layers, W being the global model after the round. Costs dense matrices: an option.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rayfed.lora.adapter import LowRank
from rayfed.methods import Method, Update
from rayfed.methods.base import BaseChange


class Diagnostics:
    """Adds up one round's updates, then compares. All sums are in float64."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._products: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}  # sums of s B (out, r_max) and of A (r_max, in)

    def add(self, update: Update, base: BaseChange) -> None:
        """Adds one client: its trained adapter, over the base it trained on."""
        self._weight += update.weight
        for name, trained in update.trained.layers.items():
            pair = trained.folded()
            B, A = pair.scale * pair.B.double(), pair.A.double()
            shape = B.shape[0], A.shape[1]
            product = self._products.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            product += update.weight * (B @ A)
            if name in base:
                below = base[name]
                matrix = below.dense() if isinstance(below, LowRank) else below
                under = self._bases.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                under += update.weight * matrix.double()
            sums = self._factors.get(name, (B.new_zeros(shape[0], 0), A.new_zeros(0, shape[1])))
            sum_B, sum_A = (_widened(total, pair.rank, axis) for total, axis in zip(sums, (1, 0)))
            sum_B[:, : pair.rank] += update.weight * B
            sum_A[: pair.rank] += update.weight * A
            self._factors[name] = sum_B, sum_A

    def report(self, method: Method, state: Any) -> dict[str, float]:
        """Both distances, relative; 0 where the averages themselves are 0."""
        products, means, size_products, size_means = 0.0, 0.0, 0.0, 0.0
        for name, product in self._products.items():
            change = method.delta(state, name)
            W = (change.dense() if isinstance(change, LowRank) else change).double()
            base = self._bases.get(name, torch.zeros_like(product)) / self._weight
            D = base + product / self._weight
            sum_B, sum_A = self._factors[name]
            P = base + sum_B @ sum_A / self._weight**2
            products += float((W - D).square().sum())
            means += float((W - P).square().sum())
            size_products += float(D.square().sum())
            size_means += float(P.square().sum())
        return {
            "diagnostics/to_mean_of_products": math.sqrt(products / size_products) if size_products else 0.0,
            "diagnostics/to_product_of_means": math.sqrt(means / size_means) if size_means else 0.0,
        }


def _widened(total: Tensor, rank: int, axis: int) -> Tensor:
    """The sum, padded with zeros to ``rank`` ranks along ``axis``."""
    missing = rank - total.shape[axis]
    if missing <= 0:
        return total
    shape = list(total.shape)
    shape[axis] = missing
    return torch.cat([total, total.new_zeros(shape)], axis)
