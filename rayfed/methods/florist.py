"""FLoRIST (Ramesh and Dass, arXiv 2506.09199): FLoRA's round, with the stack cut to its leading singular values.

    B_st A_st = U S V^T                            by QR of both sides and the SVD of their core (R, R)
    p   = the smallest with  sum_{j <= p} S_j^2 >= tau sum_j S_j^2              layer by layer
    W  <- W + (U_p S_p) V_p^T                      merged into the base; the next round starts from fresh factors

Up: r_k (out + in) a layer. Down: the head, and for every client the p (out + in) entries of each layer and p itself.
tau = 1 loses nothing. Below 1, what is cut is lost for good: the base gets only what is sent.

Source: secondary; deviates: the default of tau and the one A that clients share (see `FLoRA`) are ours. The authors'
published code has the same rule for p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.config.types import Density
from rayfed.lora.adapter import LowRank
from rayfed.lora.algebra import svd
from rayfed.methods.flora import FLoRA


@dataclass(frozen=True)
class FLoRIST(FLoRA):
    """Merge the leading singular directions of the stack."""

    tau: Density = 0.99
    """Share of each stack's energy (squared singular values) that is sent and merged. The default is ours."""

    paper = "arXiv 2506.09199"
    summary = "FLoRA with the stack cut to most of its energy"
    traffic_down = "p (in + out)"

    def condense(self, stacked: LowRank) -> LowRank:
        spectrum = svd(stacked, dtype=torch.float64)
        energy = spectrum.S.square().cumsum(0)
        # Where no client changed anything there is no energy, and nothing to send.
        p = int((energy < self.tau * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0
        B, A = spectrum.U[:, :p] * spectrum.S[:p], spectrum.Vh[:p]
        # Row by row in memory, as clients decode it. Then their merge has the server's bits.
        return LowRank(B.float().contiguous(), A.float().contiguous(), 1.0)

    def flat(self, factors: Mapping[str, LowRank]) -> Tensor:
        """The base update as one vector: first each layer's p by name, for they differ."""
        ranks = [float(factors[name].rank) for name in sorted(factors)]
        return torch.cat([torch.tensor(ranks), super().flat(factors)])
