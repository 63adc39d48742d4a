"""Fed-SB (arXiv 2502.15436): only an r x r core between two frozen factors trains and travels.

A layer's change is ``s B R A`` with B (out, r) and A (r, in) frozen and shared, R (r, r) trained, 0 at first:

    R    <- advance(R, sum_k p_k (R_k - R))

B and A being the same for everybody, the mean of cores is the mean of products: exact. Only ``r^2`` entries a layer
travel, up and down, and the head; B and A come from the run's seed. The gauge is fixed, so any server optimizer may act
on R. All clients have one rank. No options.

The paper initialises B and A from the singular vectors of a first update step; its text was not at hand, and here they
are random and orthonormal: columns of B and rows of A from the QR decomposition of Gaussian matrices, keyed by (run
seed, layer). With orthonormal factors ``||s B R A|| = s ||R||``, so the scale means what it means for LoRA's own B.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods._state import Global, Layered, advance_head
from rayfed.methods.base import Advance, Profile, Start, Trainable, Update, fedavg, mean_change
from rayfed.seeding import torch_rng


@dataclass(frozen=True)
class FedSB(Layered):
    """Train and average the cores; no options."""

    optimizers = ("fedavg", "sgd", "fedavgm", "fedadam", "adamw")

    def init(self, adapter: Adapter, seed: int) -> Global:
        """A start that already changes something is kept, as a base: its factors are not the frozen ones."""
        layers, base = {}, {}
        for name, pair in adapter.layers.items():
            out, inner = pair.B.shape[0], pair.A.shape[1]
            rank = pair.rank
            B, A = _orthonormal(seed, "B", name, out, rank), _orthonormal(seed, "A", name, inner, rank).T.contiguous()
            layers[name] = LowRank(B, A, pair.scale, torch.zeros(rank, rank))
            if bool(pair.B.any()):
                base[name] = pair.dense()
        cores = {f"R.{name}": pair.R for name, pair in layers.items() if pair.R is not None}
        return Global({n: LowRank(p.B, p.A, p.scale) for n, p in layers.items()}, dict(adapter.head), 0, base, cores)

    def broadcast(self, state: Global, client: Profile) -> Start:
        adapter = Adapter({name: _with_core(state, name) for name in state.layers}, state.head)
        return Start(adapter.flatten(), adapter.layout, known=adapter.layout.mask("A", "B"), base=state.base)

    def trainable(self, state: Global, client: Profile) -> Trainable:
        return Trainable(parts=("R", "head"))

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        adapter = Adapter({name: _with_core(state, name) for name in state.layers}, state.head)
        change = adapter.layout.unflatten(mean_change(updates, adapter.layout.size))
        extras = dict(state.extras)
        for name, pair in change.layers.items():
            assert pair.R is not None
            extras[f"R.{name}"] = advance(f"R.{name}", extras[f"R.{name}"], pair.R)
        head = advance_head(state.head, change.head, advance)
        return replace(state, head=head, extras=extras, rounds=state.rounds + 1)

    def delta(self, state: Global, layer: str) -> LowRank | Tensor:
        pair = _with_core(state, layer)
        return pair.dense() + state.base[layer] if layer in state.base else pair.folded()


def _with_core(state: Global, name: str) -> LowRank:
    pair = state.layers[name]
    assert isinstance(pair, LowRank)
    return LowRank(pair.B, pair.A, pair.scale, state.extras[f"R.{name}"])


def _orthonormal(seed: int, factor: str, layer: str, rows: int, rank: int) -> Tensor:
    """(rows, rank) with orthonormal columns; signs fixed, since those of a QR decomposition are arbitrary."""
    drawn = torch.randn(rows, rank, generator=torch_rng(seed, "fed_sb", factor, layer), dtype=torch.float64)
    Q, R = torch.linalg.qr(drawn)
    return (Q * torch.sign(torch.diagonal(R))).float()
