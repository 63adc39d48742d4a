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
from torch import Tensor, nn

from rayfed.methods import BaseChange, Method, Update, matrix


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
                under = self._bases.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                under += update.weight * matrix(base[name]).double()
            sum_B, sum_A = self._factors.get(name, (B.new_zeros(shape[0], 0), A.new_zeros(0, shape[1])))
            more = max(pair.rank - len(sum_A), 0)
            sum_B, sum_A = nn.functional.pad(sum_B, (0, more)), nn.functional.pad(sum_A, (0, 0, 0, more))
            sum_B[:, : pair.rank] += update.weight * B
            sum_A[: pair.rank] += update.weight * A
            self._factors[name] = sum_B, sum_A

    def report(self, method: Method, state: Any) -> dict[str, float]:
        """Both distances, relative; 0 where the averages themselves are 0."""
        squares = torch.zeros(4, dtype=torch.float64)
        for name, product in self._products.items():
            W = matrix(method.delta(state, name)).double()
            base = self._bases.get(name, torch.zeros_like(product)) / self._weight
            D = base + product / self._weight
            sum_B, sum_A = self._factors[name]
            P = base + sum_B @ sum_A / self._weight**2
            squares += torch.stack([x.square().sum() for x in (W - D, W - P, D, P)])
        to_products, to_means, products, means = squares.tolist()
        return {
            "diagnostics/to_mean_of_products": math.sqrt(to_products / products) if products else 0.0,
            "diagnostics/to_product_of_means": math.sqrt(to_means / means) if means else 0.0,
        }
