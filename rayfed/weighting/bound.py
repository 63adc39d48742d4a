"""Weights from a bound on how a client's loss can change under a shift of its data (Xu et al., arXiv 2311.05936).

X is the squared loss of a row, the loss clipped to M' = `cap`, so X is in [0, M] with M = M'^2. m and v are its mean
and variance over client k's own rows, under the model that the client trained. For all distributions within the
Hellinger distance rho of the client's, with q = rho^2, E X lies between (Weber et al. 2022)

    C = sqrt(q (2 - q)) (1 - q)
    U = m + 2 C sqrt(v) + q (2 - q) (M - m - v / (M - m))   if q < 1 - 1 / sqrt(1 + (M - m)^2 / v), else M
    L = m - 2 C sqrt(v) - q (2 - q) (m - v / m)             if q <= 1 - 1 / sqrt(1 + m^2 / v), else 0

    p_k ~ U_k - L_k  (direction: gap)   or   1 / (U_k - L_k)  (inverse)

With `delta`, m and v are bounds that hold for n rows with that confidence: m +- M sqrt(ln(2 / delta) / 2n), within
[0, M], and sqrt(v) + M sqrt(2 ln(2 / delta) / (n - 1)). Small clients then have the largest gaps.

A client sends m, v and n: three floats. If a gap is 0, as all are with rho = 0, clients count by their examples. A
client with U = M and L = 0 has the largest gap whatever it learned: `weighting/at_caps` is the share of such clients.

Source: abstract only; deviates: the bound is exact, its use is a guess. The abstract says that "bounds disagreements"
of the "second-order origin moment" are the proportions; `direction: gap` is that reading, `inverse` trusts the stable
clients. rho, M, the model and the rows of the moments are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayfed.profiles.profile import Profile
from rayfed.weighting.base import Weighting, prior


@dataclass(frozen=True)
class Bound(Weighting):
    """Weights from the gap between the two bounds."""

    direction: Literal["gap", "inverse"] = "gap"
    """Whether clients with a large `gap` count more, as we read the abstract, or less (`inverse`)."""
    rho: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Hellinger distance up to which a client's data may shift."""
    cap: Annotated[float, Field(ge=1e-6, le=1e6)] = 5.0
    """M', at which the loss of a row is clipped, in nats. 5 is about the loss of a guess among 150 classes."""
    delta: Annotated[float, Field(ge=1e-30, lt=1)] | None = None
    """Confidence of the bounds for a finite number of rows: they fail with probability delta. null: moments count as
    exact."""
    rows: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Most rows of a client of which the loss is measured, drawn anew in each round. null: all."""

    needs = "trained_losses"

    def statistics(self, losses: Tensor) -> Tensor:
        x = losses.nan_to_num(self.cap, self.cap).clamp(0, self.cap) ** 2
        return torch.stack([x.mean(), x.var(correction=0), torch.tensor(float(len(x)), dtype=x.dtype)]).float()

    def weights(self, clients: Sequence[Profile], statistics: Tensor) -> Tensor:
        upper, lower = self.bounds(statistics)
        gaps = upper - lower
        if not bool((gaps > 0).all()):
            return prior(clients)
        return gaps if self.direction == "gap" else gaps.min() / gaps

    def report(self, statistics: Tensor) -> Mapping[str, float]:
        upper, lower = self.bounds(statistics)
        return {"at_caps": float(((upper == self.cap**2) & (lower == 0)).double().mean())}

    def bounds(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """(U (K,), L (K,)) of clients with these (m, v, n) (K, 3), float64."""
        most, (mean, variance, rows) = self.cap**2, statistics.unbind(1)
        low, high, std = mean.clamp(max=most), mean.clamp(max=most), variance.clamp(min=0).sqrt()
        if self.delta is not None:
            term = math.log(2 / self.delta)
            off = most * (term / (2 * rows)).sqrt()
            low, high = (mean - off).clamp(min=0), (mean + off).clamp(max=most)
            std = std + most * (2 * term / (rows - 1)).sqrt()  # one row: infinite, and both bounds are the caps
        q = self.rho**2
        C, D = math.sqrt(q * (2 - q)) * (1 - q), q * (2 - q)

        def bound(room: Tensor) -> Tensor:
            """How far E X can move towards a limit that is ``room`` (K,) away, at most ``room``."""
            moved = 2 * C * std + D * (room - std**2 / room)
            near = 1 / (1 + (room / std) ** 2).sqrt()  # std = 0: room / std is infinite, and this is 0
            inside = (q < 1 - near) & (room > 0)
            return torch.where(inside, moved, room).minimum(room)

        return high + bound(most - high), low - bound(low)
