"""FLASC (Kuo et al., arXiv 2406.05233): sparse communication, dense local training.

P is the adapter and head as one flat vector of n entries; the server's copy is dense. In round t:

    1  M       = top-floor(d_down n) of |P|, over the whole vector      what travels down
    2  P_k     = local training from P * M, of all entries              dense, though the start is sparse
    3  Delta_k = top-floor(d_up n) of P_k - P * M, by magnitude         what travels up; no error feedback
    4  g       = -(1/K) sum_k Delta_k                                   an entry that nobody sent counts as zero
    5  P      <- one AdamW step on g (torch's defaults), by the server

Density is a setting of the wire that any method can use, so most lines live outside this file:

    1  rayfed/server/downlink.py                top-k of the download; `wire.down.density` and its decay
    2  rayfed/clients/local_training.py         local training
    3  rayfed/clients/transfer.py               top-k of the upload, by `Method.select`; `wire.up.density`
    4  rayfed/methods/_means.py                 `mean_change`, with uniform weights
    5  rayfed/server/optimizers.py              AdamW

This class holds the paper's defaults, and two options that give the baselines of the paper's code:

    mask=refresh, train=all        FLASC
    mask=refresh, train=masked     Federated Select; with a density decay, Adapter LTH
    mask=fixed,   train=masked     SparseAdapter: one dense round, then one mask for good

Source: authors' code read; deviates: with mask=fixed the code sends only the first download dense, and cuts the mask
once; here the first uploads are dense too, and the mask shrinks with a density decay. Clients without data are never
drawn. With density tiers the code always sends the head dense down. tests/methods/test_flasc_reference.py has a dense
reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rayfed.methods import Advance, FactorMean, FactorState, Profile, Start, Trainable, Updates, fedavg
from rayfed.wire import top_mask


@dataclass(frozen=True)
class Flasc(FactorMean):
    """Sparse down, dense training, sparse up; uniform weights and AdamW on the server, as in the paper's code."""

    mask: Literal["refresh", "fixed"] = "refresh"
    """Which entries travel down. `refresh`: chosen anew each round. `fixed`: chosen once, after a dense first round."""
    train: Literal["all", "masked"] = "all"
    """Which entries clients train: all of them, or only those that travelled down."""

    paper = "arXiv 2406.05233"
    summary = "sparse down and up, dense local training"
    traffic_down = "d_down r (in + out)"
    traffic_up = "d_up r (in + out)"
    source = "authors' code read"
    weights = "uniform"
    optimizer = "adamw"
    sum_in_worker = True
    secure_aggregation = True

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        start = super().broadcast(state, client)
        if self.mask == "refresh":
            return start
        if "anchor" not in state.extras:
            return replace(start, dense=True)
        anchor = state.extras["anchor"].nan_to_num()  # a start that is not finite is refused by the downlink
        return replace(start, mask=top_mask(anchor, client.density_down))

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(received_only=self.train == "masked")

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        state = super().aggregate(state, updates, advance)
        if self.mask == "fixed" and "anchor" not in state.extras:
            state = replace(state, extras={"anchor": state.vector})
        return state
