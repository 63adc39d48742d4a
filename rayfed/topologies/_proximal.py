"""Proximal operators, row by row: ``prox_{alpha h}(v) = argmin_u h(u) + ||u - v||^2 / (2 alpha)``.

``v`` (K, m) has a client in each row. ``columns`` (m,) int64 numbers the groups of entries on which h acts; entries at
-1 have no penalty and stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def l1(v: Tensor, threshold: float, columns: Tensor) -> Tensor:
    """Soft threshold: ``sign(v) max(|v| - threshold, 0)``, where ``threshold`` is alpha times the weight of ``|u|``."""
    shrunk = v.sign() * (v.abs() - threshold).clamp(min=0)
    return torch.where(columns >= 0, shrunk, v)


def mcp(v: Tensor, alpha: float, weight: float, theta: float, columns: Tensor) -> Tensor:
    """The prox of the minimax concave penalty (Zhang 2010), for alpha < theta.

    ``h(u) = weight |u| - u^2 / (2 theta)`` up to ``|u| = weight theta``, and constant from there on: large entries are
    not shrunk.
    """
    shrunk = v.sign() * (v.abs() - alpha * weight).clamp(min=0) / (1 - alpha / theta)
    return torch.where((columns >= 0) & (v.abs() <= weight * theta), shrunk, v)


def group_l2(v: Tensor, threshold: float, columns: Tensor) -> Tensor:
    """Each group times ``max(1 - threshold / norm, 0)``: whole columns become 0. ``threshold`` as in `l1`."""
    acts = columns >= 0
    groups, penalised = columns[acts], v[:, acts]
    squares = v.new_zeros(len(v), int(columns.max()) + 1).index_add_(1, groups, penalised.square())
    norms = squares.sqrt()
    factors = torch.where(norms > threshold, 1 - threshold / norms, 0.0)
    shrunk = v.clone()
    shrunk[:, acts] = penalised * factors[:, groups]
    return shrunk
