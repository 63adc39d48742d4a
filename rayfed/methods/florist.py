"""FLoRIST (Ramesh and Dass, arXiv 2506.09199): FLoRA's round, with the stack cut to its leading singular values.

    B_st A_st = U S V^T                            by QR of both sides and the SVD of their core (R, R)
    p   = the smallest with  sum_{j <= p} S_j^2 >= tau sum_j S_j^2              layer by layer
    W  <- W + (U_p S_p) V_p^T                      merged into the base; the next round starts from fresh factors

Up: r_k (out + in) a layer. Down: the head, and as news for every client the p (out + in) entries of each layer and p
itself. tau = 1 loses nothing; below it, what is cut is lost for good: the base gets only what is sent.

The equations come from a collection; the paper's own text was not at hand. Its published code has the same rule for p,
energy being the sum of squares. The default of tau is ours, and so is the one A that clients share: see `FLoRA`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.errors import allowed
from rayfed.lora.adapter import LowRank
from rayfed.lora.algebra import svd
from rayfed.methods.flora import FLoRA, flat


@dataclass(frozen=True)
class FLoRIST(FLoRA):
    """Merge the leading singular directions of the stack."""

    tau: float = 0.99
    """Share of each stack's energy (squared singular values) to keep: over 0, at most 1. The default is ours."""

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise allowed("method.tau", self.tau, "it must be over 0 and at most 1")

    def condense(self, stacked: LowRank) -> LowRank:
        spectrum = svd(stacked, dtype=torch.float64)
        energy = spectrum.S.square().cumsum(0)
        # Where nobody changed anything there is no energy, and nothing to send.
        p = int((energy < self.tau * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0
        B, A = spectrum.U[:, :p] * spectrum.S[:p], spectrum.Vh[:p]
        # Row by row in memory, as clients decode it: their merge then has the server's bits.
        return LowRank(B.float().contiguous(), A.float().contiguous(), 1.0)

    def announce(self, factors: Mapping[str, LowRank]) -> Tensor:
        """The news: first each layer's p, by name, for they differ."""
        ranks = [float(factors[name].rank) for name in sorted(factors)]
        return torch.cat([torch.tensor(ranks), flat(factors)])
