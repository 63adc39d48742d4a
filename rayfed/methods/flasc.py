"""FLASC (Kuo et al., arXiv 2406.05233): sparse communication, dense local training.

P is the adapter and head as one flat vector of n entries; the server's copy is dense. In round t:

    M       = top-floor(d_down n) of |P|, over the whole vector         what travels down
    P_k     = local training from P * M, of all entries                 dense, though the start is sparse
    Delta_k = top-floor(d_up n) of |P_k - P * M|                        what travels up; no error feedback
    g       = -(1/K) sum_k Delta_k                                      an entry nobody sent counts as zero
    P      <- one AdamW step on g (torch's defaults), by the server

Densities and their decays are the wire's settings (`wire.down`, `wire.up`), which also picks the largest entries.
The options give the baselines of the paper's code:

    mask=refresh, train=all        FLASC
    mask=refresh, train=masked     Federated Select; with a density decay, Adapter LTH
    mask=fixed,   train=masked     SparseAdapter: one dense round, then one mask for good
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from rayfed.methods._factor_mean import FactorMean, FactorState
from rayfed.methods.base import Advance, Profile, Start, Trainable, Update, fedavg
from rayfed.wire import top_mask


@dataclass(frozen=True)
class Flasc(FactorMean):
    """Sparse down, dense training, sparse up; uniform weights and AdamW on the server, as in the paper's code."""

    mask: Literal["refresh", "fixed"] = "refresh"
    """Which entries travel down: chosen anew each round, or once, after a dense first round."""
    train: Literal["all", "masked"] = "all"
    """Which entries clients train: all of them, or only those that travelled down."""

    weights = "uniform"
    optimizer = "adamw"
    sum_in_worker = True

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        start = super().broadcast(state, client)
        if self.mask == "refresh":
            return start
        if "anchor" not in state.extras:
            return replace(start, dense=True)
        return replace(start, mask=top_mask(state.extras["anchor"], client.density_down))

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(received_only=self.train == "masked")

    def aggregate(self, state: FactorState, updates: Iterable[Update], advance: Advance = fedavg) -> FactorState:
        state = super().aggregate(state, updates, advance)
        if self.mask == "fixed" and "anchor" not in state.extras:
            state = replace(state, extras={"anchor": state.vector})
        return state
