"""DEPOSITUM (Zhou et al., arXiv 2504.12742): proximal gradient tracking with momentum, on a graph without a server.

The clients minimise ``(1/n) sum_i f_i(x) + h(x)``, with h perhaps not smooth. Client i has a model x_i, a momentum
nu_i, a tracking variable y_i and its last gradient g_i. x_i starts at a common point, the others at 0. In each step

    nu_i <- gamma nu_i + (1 - gamma) y_i
    x    <- W^t prox_{alpha h}(x - alpha nu)        prox_mix
    or   <- prox_{alpha h}(W^t x - alpha nu)        mix_prox
    g'_i  = stochastic gradient of f_i at the new x_i
    y    <- W^t (y + g' - g);   g <- g'

W^t is W in the last of T0 steps, and I in the others: T0 steps and one communication are a round, in which two messages
go to each neighbour, x and then y. alpha is `client.lr`, gamma `client.momentum`, T0 `client.steps`. Since W is doubly
stochastic, ``mean_i y_i = mean_i g_i`` after every step: y_i estimates the gradient of the mean objective. So local
steps do not drift to the clients' own optima, and all x_i reach the optimum of the mean. The first step moves nothing
but by the prox, because y = 0.

Source: abstract only; the order of prox and average is a guess, and so both are options. Both converge to the same
point. After `prox_mix` the average fills zeros in again; with `mix_prox` each client's x is exactly sparse under l1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from rayfed.config.training import Client
from rayfed.errors import allowed
from rayfed.topologies._proximal import group_l2, l1, mcp
from rayfed.topologies.base import Algorithm, Network, Vectors


@dataclass(frozen=True)
class Depositum(Algorithm):
    """Gradient tracking with momentum and a proximal step."""

    prox: Literal["none", "l1", "mcp", "group_l2"] = "none"
    """h, which acts on the entries of B (of R with fed_sb): none, the l1 norm, the minimax concave penalty, or the sum
    of the columns' L2 norms, which selects ranks. Head and A have no penalty."""
    prox_weight: NonNegativeFloat = 0.0
    """Weight of h."""
    mcp_theta: PositiveFloat = 3.0
    """Where the minimax concave penalty is flat: from prox_weight * mcp_theta on. Above client.lr."""
    order: Literal["prox_mix", "mix_prox"] = "prox_mix"
    """In a communicating step: the prox, then the average; or the average, then the prox. Which of them is the paper's
    is a guess; both converge to the same point."""

    vectors: ClassVar[tuple[str, ...]] = ("x", "y", "nu", "g")
    exchanges: ClassVar[int] = 2
    objectives: ClassVar[tuple[str, ...]] = ("plain", "fedlc", "fedga", "tail_penalty")

    def check(self, name: str, client: Client) -> None:
        if client.optimizer != "sgd":
            what = f"an adaptive step breaks the gradient tracking of {name}; sgd is allowed"
            raise allowed("client.optimizer", client.optimizer, what)
        if client.steps is None:
            raise allowed("client.steps", None, f"{name} needs T0, its number of local steps; 1 or more")
        if client.weight_decay:
            what = f"{name} has topology.prox for that; 0 is allowed"
            raise allowed("client.weight_decay", client.weight_decay, what)
        if client.on_divergence != "fail":
            what = f"{name} tracks the gradient of every active client; fail is allowed"
            raise allowed("client.on_divergence", client.on_divergence, what)
        if (self.prox == "none") != (self.prox_weight == 0):
            what = f"topology.prox is {self.prox}; allowed is {'0' if self.prox == 'none' else 'above 0'}"
            raise allowed("topology.prox_weight", self.prox_weight, what)
        if self.prox == "mcp" and self.mcp_theta <= client.lr:
            what = f"it must be above client.lr={client.lr:g}, or the proximal step has more than one answer"
            raise allowed("topology.mcp_theta", self.mcp_theta, what)

    def round(self, own: Vectors, network: Network) -> Vectors:
        x, y, nu, g = (own[name] for name in self.vectors)
        alpha, gamma, steps = network.lr, network.settings.momentum, network.settings.steps
        assert steps is not None
        for step in range(steps):
            mix: Callable[[Tensor], Tensor] = network.exchange if step + 1 == steps else _identity
            nu = gamma * nu + (1 - gamma) * y
            if self.order == "prox_mix":
                x = mix(self.proximal(x - alpha * nu, alpha, network.columns))
            else:
                x = self.proximal(mix(x) - alpha * nu, alpha, network.columns)
            new = network.gradients(x, step)
            y, g = mix(y + new - g), new
        return {"x": x, "y": y, "nu": nu, "g": g}

    def proximal(self, v: Tensor, alpha: float, columns: Tensor) -> Tensor:
        """``prox_{alpha h}`` of each row of ``v`` (K, m); ``columns`` (m,) as in `Network`."""
        match self.prox:
            case "none":
                return v
            case "l1":
                return l1(v, alpha * self.prox_weight, columns)
            case "mcp":
                return mcp(v, alpha, self.prox_weight, self.mcp_theta, columns)
            case "group_l2":
                return group_l2(v, alpha * self.prox_weight, columns)


def _identity(values: Tensor) -> Tensor:
    return values
