"""FedIT (Zhang et al., arXiv 2305.05644): the factors themselves are averaged.

    B <- sum_k p_k B_k,   A <- sum_k p_k A_k,   head likewise,   p_k ~ n_k

The mean of factors is not the mean of products: ``mean(B) mean(A) != mean(B A)``. That error is the price of its
simplicity, and what later methods remove.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayfed.methods._factor_mean import FactorMean


@dataclass(frozen=True)
class FedIT(FactorMean):
    """Average the factors, weighted by examples. No options."""

    sum_in_worker = True
