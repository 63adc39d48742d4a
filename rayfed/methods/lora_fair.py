"""LoRA-FAIR (Bian, Wang, Zhang and Xu, arXiv 2411.14961): means of factors, with B corrected towards the mean product.

    Bbar = sum_k p_k B_k,   Abar = sum_k p_k A_k,   D = sum_k p_k s B_k A_k
    dB   = argmin ||D / s - (Bbar + dB) Abar||_F^2 + lam ||dB||_F^2
         = (D - s Bbar Abar) Abar^T (Abar Abar^T + lam I)^-1 / s
    B   <- Bbar + dB,   A <- Abar

With lam = 0 the product is the exact mean D, projected on the row space of Abar; with a large lam it is FedIT's. All
clients have one rank r, and so one scale s; traffic is FedIT's, r (in + out) entries a layer both ways.

A sparse or rounded download leaves nothing out of the means: they are the server's values plus the mean
changes, and what the wire kept back is put back into D. The correction re-factors the model each round, so momentum has
no meaning: the server step is the plain one.

Objective and closed form come from a collection, the scale made explicit by us; the paper's own text was not at hand,
so lam's default is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed.errors import allowed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import norm
from rayfed.methods._factor_mean import FactorMean, FactorState
from rayfed.methods._state import Change, ProductMean, trained_product
from rayfed.methods.base import Advance, Update, fedavg


@dataclass(frozen=True)
class LoRAFAIR(FactorMean):
    """The mean of factors, and a least-squares step of B towards the mean of products."""

    lam: float = 0.01
    """Weight of ``||dB||^2``; 0 or more. Abar Abar^T starts near a third of the identity. The default is ours."""

    optimizers = ("fedavg",)

    def __post_init__(self) -> None:
        if not 0 <= self.lam < math.inf:
            raise allowed("method.lam", self.lam, "it must be 0 or more, and finite")

    def aggregate(self, state: FactorState, updates: Iterable[Update], advance: Advance = fedavg) -> FactorState:
        products, total = ProductMean(), torch.zeros(state.layout.size, dtype=torch.float64)
        for update in updates:
            meant = self.broadcast(state, update.client)
            update.add_to(total)
            products.add(update.weight, Adapter(trained_product(update, meant), {}))
        if products.weight <= 0:
            raise ValueError("no update with a positive weight to aggregate")
        vector = advance("vector", state.vector, (total / products.weight).float())
        mean = state.layout.unflatten(vector)
        layers, before, after, whole = {}, 0.0, 0.0, 0.0
        for name, pair in mean.layers.items():
            D = products.layer(name)
            layers[name], gaps = self._correct(D, pair)
            before, after, whole = before + gaps[0], after + gaps[1], whole + norm(D) ** 2
        vector = Adapter(layers, mean.head).flatten()
        report = {"gap_before": _share(before, whole), "gap": _share(after, whole)}
        return replace(state, vector=vector, rounds=state.rounds + 1, report=report)

    def _correct(self, D: Change, mean: LowRank) -> tuple[LowRank, tuple[float, float]]:
        """The pair with B corrected, and its squared distance from D before and after."""
        B, A = mean.B.double(), mean.A.double()
        target = _times(D, A.T) / mean.scale
        gram = A @ A.T
        ridge = gram + self.lam * torch.eye(mean.rank, dtype=gram.dtype)
        residual = target - B @ gram  # (D / s - Bbar Abar) Abar^T
        dB = residual @ torch.linalg.pinv(ridge, hermitian=True)
        energy = norm(D) ** 2

        def gap(B: Tensor) -> float:
            product = B @ gram - 2 * target
            return max(energy + mean.scale**2 * float((product * B).sum()), 0.0)

        return LowRank((B + dB).float(), mean.A, mean.scale), (gap(B), gap(B + dB))


def _times(change: Change, right: Tensor) -> Tensor:
    """``change @ right`` in float64, without forming a pair's matrix."""
    if isinstance(change, LowRank):
        return change.scale * (change.B.double() @ (change.A.double() @ right))
    return change.double() @ right


def _share(gap: float, whole: float) -> float:
    """``||D - s B A|| / ||D||`` over all layers."""
    return math.sqrt(gap / whole) if whole else 0.0
