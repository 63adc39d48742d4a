"""A whole matrix in the form of an adapter: what methods share that train all entries of a weight.

One factor is the matrix W (out, in), the other the identity on its shorter side: scale 1, rank min(in, out). Both ends
know the identity, so only W travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayfed.lora.adapter import LowRank


def with_identity(W: Tensor, diagonal: float = 1.0) -> LowRank:
    """W as one factor; the other is ``diagonal`` times the identity, on the shorter side."""
    out, inner = W.shape
    other = diagonal * torch.eye(min(out, inner))
    return LowRank(W, other, 1.0) if inner <= out else LowRank(other, W, 1.0)


def matrix_of(pair: LowRank) -> Tensor:
    """The W of which `with_identity` made the pair."""
    return pair.B if pair.A.shape[1] <= pair.B.shape[0] else pair.A
