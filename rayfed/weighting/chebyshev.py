"""Modified Chebyshev weights (OTA-FFL, arXiv 2501.03392): clients with a large loss count more, within a box.

With f_k the mean loss of the model that client k received on the client's own rows, and p0_k its share of the
examples (FedAvg's weights):

    p = argmax sum_k p_k f_k     subject to sum_k p_k = 1, max(0, p0_k - eps) <= p_k <= min(1, p0_k + eps)

eps = 0 is FedAvg; eps = 1 puts all weight on the client with the largest loss, as min-max fairness does. The optimum is
exact: weights start at their lower bounds, and the rest fills the clients up in the order of their losses. Of equal
losses the client that comes first in the cohort is filled first.

A client sends f_k: one float. It measures f_k before it trains, in a pass over its rows without gradients.

Source: abstract only; deviates: the paper says "modified Chebyshev"; the box is a guess (it is FedMGDA+'s).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rayfed.profiles.profile import Profile
from rayfed.weighting.base import Weighting, prior


@dataclass(frozen=True)
class Chebyshev(Weighting):
    """Weights from FedAvg's (eps 0) to those of the worst client alone (eps 1)."""

    eps: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How far a weight may be from the client's share of the examples."""
    rows: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Most rows of a client of which the loss is measured, drawn anew in each round. null: all."""

    needs = "sent_losses"

    def statistics(self, losses: Tensor) -> Tensor:
        return losses.mean().nan_to_num(torch.inf, torch.inf)[None].float()  # a loss that is NaN is the worst

    def weights(self, clients: Sequence[Profile], statistics: Tensor) -> Tensor:
        return box(statistics[:, 0], prior(clients), self.eps)


def box(losses: Tensor, shares: Tensor, eps: float) -> Tensor:
    """argmax of ``p @ losses`` over p (K,) with sum 1 and ``|p - shares| <= eps``, within [0, 1]. All float64."""
    p, upper = (shares - eps).clamp(min=0), (shares + eps).clamp(max=1)
    rest = 1 - float(p.sum())
    for k in losses.argsort(descending=True, stable=True).tolist():
        more = min(max(rest, 0.0), float(upper[k] - p[k]))
        p[k] += more
        rest -= more
    return p
