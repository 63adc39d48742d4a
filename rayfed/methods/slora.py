"""SLoRA (Babakniya et al., arXiv 2308.06522): a sparse first stage finds where LoRA should start.

Stage 1, rounds 0 to `rounds_sparse` - 1, is sparse full fine-tuning. One random mask per adapted matrix, drawn once,
lets the share `rho` of its entries train. W (out, in) is the layer's change so far, and p_k ~ n_k:

    W <- W + sum_k p_k (W_k - W)           on the mask; zero elsewhere; about rho out in entries travel, both ways

Stage 2 begins with the result of the last sparse round. Its best approximation of rank r becomes the LoRA pair,

    s B A = U_r S_r V_r^T  of  W           on the pretrained base; what the truncation cuts off is dropped

and FedIT follows: B <- sum_k p_k B_k, A <- sum_k p_k A_k, with r (in + out) entries both ways. The head trains and is
averaged in both stages.

A client trains W in the form of an adapter (`rayfed.methods._full_matrices`). Both ends know the entries outside the
mask, so these do not travel. The mask is drawn from the run's seed, so its indices do not travel either. Entry i of the
flat vector means something else in each stage, so no server optimizer could keep its moments: the plain mean is the
only step.

Source: secondary; deviates: ours are the share `rho` in each matrix by itself; that matrices without LoRA stay frozen
in stage 1; and that a direction that W does not have (a singular value of zero) starts as LoRA does, with B = 0 and a
random row in A. `lost_energy` reports the share of ||W||_F^2, over all layers, that the truncation dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from rayfed.config.types import Density
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import norm, svd, tail_energy
from rayfed.methods import Change, LayerMethod, LayerState
from rayfed.methods._full_matrices import matrix_of, with_identity
from rayfed.methods._truncation import truncated
from rayfed.methods.base import Advance, Profile, Start, Trainable, Updates, fedavg, mean_change
from rayfed.seeding import torch_rng
from rayfed.wire import keep_count


@dataclass(frozen=True)
class SLoRA(LayerMethod):
    """Sparse rounds, one SVD, then FedIT."""

    rounds_sparse: PositiveInt = 5
    """Rounds of stage 1. Default: ours; a few rounds are enough to find a start."""
    rho: Density = 0.01
    """Share of each adapted matrix's entries that train in stage 1. Default: the paper's 1 %."""
    split: Literal["b", "sqrt"] = "b"
    """Where the singular values go. `b`: all in B, which leaves A's rows as long as those of a LoRA start. `sqrt`:
    their roots in each. Default: ours."""

    paper = "arXiv 2308.06522"
    summary = "sparse full fine-tuning first, then LoRA from its SVD"
    traffic_down = traffic_up = "rho in out, then r (in + out)"
    source = "secondary"
    refuses_adapter = "its first stage finds where LoRA starts"
    sum_in_worker = True
    secure_aggregation = True
    summed = "changes"

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        layers: dict[str, Change] = {}
        extras: dict[str, Tensor] = {}
        for name, pair in adapter.layers.items():
            W = pair.dense()
            order = torch.randperm(W.numel(), generator=torch_rng(seed, "slora.mask", name))
            mask = torch.zeros(W.numel(), dtype=torch.bool)
            mask[order[: keep_count(W.numel(), self.rho)]] = True
            layers[name] = W
            extras |= {f"mask.{name}": mask.view(W.shape), f"A.{name}": pair.A}
        scales = {name: pair.scale for name, pair in adapter.layers.items()}
        return LayerState(layers=layers, head=dict(adapter.head), extras=extras, notes={"scales": scales})

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        return Start.of(_adapter(state), known=~_on_mask(state) if self._sparse(state) else None)

    def trainable(self, state: LayerState, client: Profile) -> Trainable:
        return Trainable(entries=_on_mask(state) if self._sparse(state) else None)

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        sparse, adapter = self._sparse(state), _adapter(state)
        change = mean_change(updates, adapter.layout.size)
        new = adapter.layout.unflatten(advance("vector", adapter.flatten(), change))
        # Copies: views would hold the whole flat vector in memory, identities included.
        layers = {name: matrix_of(pair).clone() if sparse else _copy(pair) for name, pair in new.layers.items()}
        state = state.next(layers=layers, head={name: tensor.clone() for name, tensor in new.head.items()})
        return self._to_lora(state) if state.rounds == self.rounds_sparse else state

    def _sparse(self, state: LayerState) -> bool:
        """Whether the round that starts from this state belongs to stage 1."""
        return state.rounds < self.rounds_sparse

    def _to_lora(self, state: LayerState) -> LayerState:
        """The state in stage 2's form: the truncated SVD of every W. The mask and the spare A are no longer needed."""
        pairs: dict[str, Change] = {}
        lost = total = 0.0
        for name, W in state.layers.items():
            A, spectrum, energy = state.extras[f"A.{name}"], svd(W, dtype=torch.float64), norm(W) ** 2
            pairs[name] = _copy(truncated(spectrum, len(A), state.notes["scales"][name], self.split, A))
            lost, total = lost + tail_energy(spectrum.S, energy, len(A)), total + energy
        report = {"lost_energy": lost / total if total else 0.0}
        return replace(state, layers=pairs, extras={}, notes={}, report=report)


def _adapter(state: LayerState) -> Adapter:
    """The global adapter in the form that clients train: stage 1's matrices with an identity, stage 2's pairs."""
    pairs = {
        name: layer if isinstance(layer, LowRank) else with_identity(layer) for name, layer in state.layers.items()
    }
    return Adapter(pairs, state.head)


def _on_mask(state: LayerState) -> Tensor:
    """Boolean (n,), in stage 1: the entries that train, which are those on the masks and the head's."""
    marks = {name: with_identity(state.extras[f"mask.{name}"].float(), 0.0) for name in state.layers}
    return Adapter(marks, {name: torch.ones_like(tensor) for name, tensor in state.head.items()}).flatten().bool()


def _copy(pair: LowRank) -> LowRank:
    """The pair in float32 and in storage of its own, row by row."""
    B, A = (torch.empty(t.shape, dtype=torch.float32).copy_(t) for t in (pair.B, pair.A))
    return LowRank(B, A, pair.scale)
