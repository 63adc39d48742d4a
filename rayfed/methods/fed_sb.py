"""Fed-SB (Singhal et al., arXiv 2502.15436): only an r x r core between two frozen factors trains and travels.

A layer's change is ``s B R A``. B (out, r) and A (r, in) are frozen and shared. R (r, r) trains and is 0 at first:

    R    <- advance(R, sum_k p_k (R_k - R))

B and A are the same for all clients, so the mean of cores is exactly the mean of products. Only the ``r^2`` entries of
each layer and the head travel, both ways; B and A come from the run's seed. Any server optimizer may act on R. All
clients have one rank. No options.

With orthonormal factors ``||s B R A|| = s ||R||``, so the scale means what it means for LoRA's own B.

Source: secondary; deviates: the paper takes B and A from the singular vectors of a first update step. Here they are
random and orthonormal: the Q of the QR decomposition of Gaussian matrices, drawn from (run seed, layer).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import LayerMethod, LayerState
from rayfed.methods.base import ANY_OPTIMIZER, Advance, Profile, Start, Trainable, Updates, fedavg, mean_change
from rayfed.seeding import torch_rng


class FedSB(LayerMethod):
    """Train and average the cores. No options."""

    paper = "arXiv 2502.15436"
    summary = "frozen factors; average the core between them"
    traffic_down = traffic_up = "r^2"
    source = "secondary"
    refuses_adapter = "A and B are drawn from the seed and never travel"
    optimizers = ANY_OPTIMIZER
    fixed_gauge = True
    sum_in_worker = True
    secure_aggregation = True
    summed = "changes"
    mixing = "exact"

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        layers = {}
        for name, pair in adapter.layers.items():
            B, A = _orthonormal(seed, "B", name, pair.B), _orthonormal(seed, "A", name, pair.A.T).T.contiguous()
            layers[name] = LowRank(B, A, pair.scale, torch.zeros(pair.rank, pair.rank))
        return LayerState(layers=layers, head=dict(adapter.head))

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        return Start.of(Adapter(state.pairs, state.head), "A", "B")

    def trainable(self, state: LayerState, client: Profile) -> Trainable:
        return Trainable(parts=("R", "head"))

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        layout = Adapter(state.pairs, state.head).layout
        change = layout.unflatten(mean_change(updates, layout.size))
        layers = {}
        for name, pair in state.pairs.items():
            moved = change.layers[name].R
            assert pair.R is not None
            assert moved is not None
            layers[name] = replace(pair, R=advance(f"R.{name}", pair.R, moved))
        return state.next_with_head(advance, change.head, layers=layers)


def _orthonormal(seed: int, factor: str, layer: str, like: Tensor) -> Tensor:
    """A matrix of the shape of ``like`` with orthonormal columns. Signs are fixed: those of a QR are arbitrary."""
    drawn = torch.randn(*like.shape, generator=torch_rng(seed, "fed_sb", factor, layer), dtype=torch.float64)
    Q, R = torch.linalg.qr(drawn)
    return (Q * torch.sign(torch.diagonal(R))).float()
