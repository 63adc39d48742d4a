"""Fed-SB (Singhal et al., arXiv 2502.15436): only an r x r core between two frozen factors trains and travels.

A layer's change is ``s B R A``. B (out, r) and A (r, in) are frozen and shared. R (r, r) trains and is 0 at first:

    R    <- advance(R, sum_k p_k (R_k - R))

B and A are the same for all clients, so the mean of cores is exactly the mean of products. Only the ``r^2`` entries of
each layer and the head travel, both ways; B and A come from the run's seed. Any server optimizer may act on R. No
options.

Mixed ranks are nested. A client of rank r_k has the first r_k ranks of B and A, and the block ``R[:r_k, :r_k]``, whose
change it uploads:

    R    <- advance(R, sum_k p_k [dR_k 0; 0 0])                    moves ``s B R A`` by sum_k p_k s B_k dR_k A_k

All clients have the scale of the largest rank, as with `profiles.scale=server`. What a client lacks counts as unmoved.

With orthonormal factors ``||s B R A|| = s ||R||``, so the scale means what it means for LoRA's own B.

Source: secondary; deviates: the paper takes B and A from the singular vectors of a first update step. Here they are
random and orthonormal: the Q of the QR decomposition of Gaussian matrices, drawn from (run seed, layer). Nested ranks
are ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, Entry, LowRank
from rayfed.methods import LayerMethod, LayerState
from rayfed.methods.base import ANY_OPTIMIZER, Advance, Profile, Start, Trainable, Updates, fedavg, mean_change
from rayfed.seeding import torch_rng


class FedSB(LayerMethod):
    """Train and average the cores. No options."""

    mixed_ranks = True
    paper = "arXiv 2502.15436"
    summary = "frozen factors; average the core between them"
    traffic_down = traffic_up = "r_k^2"
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
        """A smaller rank starts with zeros outside its block of the core: so it never needs them."""
        start = Start.of(Adapter(state.pairs, state.head), "A", "B")
        block = _block(start.layout.entries, client.rank)
        if block is None or start.known is None:
            return start
        return replace(start, vector=torch.where(block, start.vector, 0.0), known=start.known | ~block)

    def trainable(self, state: LayerState, client: Profile) -> Trainable:
        layout = Adapter(state.pairs, state.head).layout
        return Trainable(parts=("R", "head"), entries=_block(layout.entries, client.rank))

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


@lru_cache(maxsize=64)
def _block(entries: tuple[Entry, ...], rank: int) -> Tensor | None:
    """Boolean (n,): all entries but those of the cores outside their first ``rank`` rows and columns. None: all.

    One tensor for equal arguments: supports are compared by identity, see `Trainable`.
    """
    if all(rank >= entry.shape[0] for entry in entries if entry.part == "R"):
        return None
    parts = []
    for entry in entries:
        own = torch.ones(entry.shape, dtype=torch.bool)
        if entry.part == "R":
            own[rank:], own[:, rank:] = False, False
        parts.append(own.flatten())
    return torch.cat(parts)


def _orthonormal(seed: int, factor: str, layer: str, like: Tensor) -> Tensor:
    """A matrix of the shape of ``like`` with orthonormal columns. Signs are fixed: those of a QR are arbitrary."""
    drawn = torch.randn(*like.shape, generator=torch_rng(seed, "fed_sb", factor, layer), dtype=torch.float64)
    Q, R = torch.linalg.qr(drawn)
    return (Q * torch.sign(torch.diagonal(R))).float()
