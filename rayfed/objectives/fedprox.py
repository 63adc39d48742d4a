"""FedProx (Li et al. 2020, arXiv 1812.06127): each client is pulled towards the values with which its round began.

  client   minimise f(x) + mu/2 ||x - x_start||^2         x: the entries of factors, core and head that train
           g <- grad f(x) + mu (x - x_start)              before the gradient is clipped
  server   unchanged

The pull is in the coordinates that train: B and A one by one, not the product B A. In the first step of a round it is
0. With SGD, lr * mu must stay below 2, else the pull itself diverges. The loss that a run reports is f alone.

Source: secondary; deviates: w is the adapter and the head; the base is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rayfed.config.types import NonNegative
from rayfed.objectives.base import Objective


@dataclass(frozen=True)
class FedProx(Objective):
    """A quadratic pull towards the start of the round."""

    mu: NonNegative = 0.01
    """Strength of the pull. 0: plain training, to the bit. The paper tries 0.001 to 1."""

    def gradient(self, values: Tensor, start: Tensor) -> Tensor:
        return self.mu * (values - start)
