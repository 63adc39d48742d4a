"""FedIT (Zhang et al., arXiv 2305.05644): average the factors themselves.

    B <- sum_k p_k B_k,   A <- sum_k p_k A_k,   head likewise,   p_k ~ n_k

The mean of factors is not the mean of products: ``mean(B) mean(A) != mean(B A)``. Later methods remove that error.

Source: secondary; deviates: nothing known.
"""

from __future__ import annotations

from rayfed.methods import FactorMean


class FedIT(FactorMean):
    """Average the factors, weighted by examples. No options."""

    paper = "arXiv 2305.05644"
    summary = "average the factors"
    source = "secondary"
    sum_in_worker = True
    fixed_gauge = True
    secure_aggregation = True
    summed = "changes"
    mixing = "biased"
