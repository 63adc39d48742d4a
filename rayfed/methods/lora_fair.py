"""LoRA-FAIR (Bian, Wang, Zhang and Xu, arXiv 2411.14961): means of factors, with B corrected towards the mean product.

    Bbar = sum_k p_k B_k,   Abar = sum_k p_k A_k,   D = sum_k p_k s B_k A_k
    dB   = argmin ||D / s - (Bbar + dB) Abar||_F^2 + lam ||dB||_F^2
         = (D - s Bbar Abar) Abar^T (Abar Abar^T + lam I)^-1 / s
    B   <- Bbar + dB,   A <- Abar

With lam = 0 the product is the exact mean D, projected on the row space of Abar. With a large lam it is FedIT's. All
clients have one rank r, and so one scale s. Traffic is FedIT's, r (in + out) entries a layer both ways.

A sparse or rounded download takes nothing out of the means: they are the server's values plus the mean changes, and D
counts what the wire left out. The correction re-factors the model each round, so momentum has no meaning: the server
step is the plain one.

Source: secondary; deviates: the scale in the closed form and the default of lam are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import norm
from rayfed.methods import Change, ChangeMean, FactorMean, FactorState, ProductMean
from rayfed.methods._means import trained_product
from rayfed.methods.base import Advance, Updates, fedavg


@dataclass(frozen=True)
class LoRAFAIR(FactorMean):
    """The mean of factors, and a least-squares step of B towards the mean of products."""

    lam: NonNegativeFloat = 0.01
    """Weight of ``||dB||^2``. Abar Abar^T starts near a third of the identity. The default is ours."""

    paper = "arXiv 2411.14961"
    summary = "average the factors, correct B towards the mean of products"
    source = "secondary"
    optimizers = ("fedavg",)
    refuses_privacy = "it needs the mean of the factors and the mean of the products of the cohort"

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        factors, products = ChangeMean(state.layout.size), ProductMean()
        for update in updates:
            factors.add(update)
            products.add(update.weight, update, trained_product(update, self.broadcast(state, update.client)))
        vector = advance("vector", state.vector, factors.mean())
        mean = state.layout.unflatten(vector)
        layers, before, after, whole = {}, 0.0, 0.0, 0.0
        for name, pair in mean.layers.items():
            D = products.layer(name)
            layers[name], gaps = self._correct(D, pair)
            before, after, whole = before + gaps[0], after + gaps[1], whole + norm(D) ** 2
        report = {"gap_before": _share(before, whole), "gap": _share(after, whole)}
        return state.next(vector=Adapter(layers, mean.head).flatten(), report=report)

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
