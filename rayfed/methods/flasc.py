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

This class holds the paper's defaults, and the options that give the baselines of the paper's code:

    mask=refresh, train=all                     FLASC
    mask=refresh, train=masked                  Federated Select; with a density decay, Adapter LTH
    mask=fixed,   train=masked                  SparseAdapter: the first download is dense, then one mask stays
    sparsity=structured, wire.down.head=dense   tiers of `profiles.densities_down` that get whole ranks by their norms

`structured` takes, of each factor by itself, floor(d r) of the rows of A or of the columns of B, those of the largest
L2 norm, at least one; and of the head floor(d n_head) entries. So a row of A may travel without its column of B.
Uploads are structured as well, by the norms of the change; dense uploads are those of the code.

Source: authors' code read; deviates: the code has structured downloads with dense uploads alone. Of ties the code's
top-k takes any. Clients without data are drawn only with `server.empty_clients`. tests/methods/test_flasc_reference.py
and tests/methods/test_flasc_variants.py have dense references.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from rayfed.lora.adapter import Layout
from rayfed.methods import Advance, FactorMean, FactorState, Profile, Start, Trainable, Updates, fedavg
from rayfed.wire import top_k, top_mask


@dataclass(frozen=True)
class Flasc(FactorMean):
    """Sparse down, dense training, sparse up; uniform weights and AdamW on the server, as in the paper's code."""

    mask: Literal["refresh", "fixed"] = "refresh"
    """Which entries travel down. `refresh`: chosen anew each round. `fixed`: all in the first round; then those that
    are chosen in the second round, with that round's density."""
    train: Literal["all", "masked"] = "all"
    """Which entries clients train: all of them, or only those that travelled down."""
    sparsity: Literal["unstructured", "structured"] = "unstructured"
    """What a density counts. `unstructured`: the largest entries, whichever they are. `structured`: of each factor the
    ranks (rows of A, columns of B) of the largest norms."""

    paper = "arXiv 2406.05233"
    summary = "sparse down and up, dense local training"
    traffic_down = "d_down r (in + out)"
    traffic_up = "d_up r (in + out)"
    source = "authors' code read"
    weights = "uniform"
    optimizer = "adamw"
    sum_in_worker = True
    fixed_gauge = True
    secure_aggregation = True
    summed = "changes"

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        start, scores, density = super().broadcast(state, client), state.vector, client.density_down
        if self.mask == "fixed":
            if "anchor" not in state.extras:
                return replace(start, dense=True)
            scores, density = state.extras["anchor"], client.density_fixed or density
        elif self.sparsity == "unstructured" or density == 1:
            return start
        scores = scores.nan_to_num()  # a start that is not finite is refused by the downlink
        if self.sparsity == "structured":
            return replace(start, mask=structured_mask(scores, state.layout, density))
        whole = state.layout.mask("head") if client.head_whole else None
        return replace(start, mask=top_mask(scores, density, whole))

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(received_only=self.train == "masked")

    def select(self, start: Tensor, change: Tensor, layout: Layout, budget: int, density: float) -> Tensor:
        if self.sparsity == "unstructured":
            return top_k(change, budget)
        ranks = structured_mask(change, layout, density)
        chosen = top_k(change.where(ranks, 0.0), budget)  # a density under 1 / r allows less than the rank it takes
        return chosen[ranks[chosen]]

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        state = super().aggregate(state, updates, advance)
        if self.mask == "fixed" and "anchor" not in state.extras:
            state = replace(state, extras={"anchor": state.vector})
        return state


def structured_mask(vector: Tensor, layout: Layout, density: float) -> Tensor:
    """Boolean (n,): each factor's ranks of the largest L2 norms, and the head's largest entries, at that density."""
    mask = layout.mask()
    values, marks = layout.unflatten(vector), layout.unflatten(mask)  # views: what is marked there is in the mask
    for name, pair in values.layers.items():
        marks.layers[name].A[top_mask(pair.A.double().norm(dim=1), density)] = True
        marks.layers[name].B[:, top_mask(pair.B.double().norm(dim=0), density)] = True
    in_head = layout.mask("head")
    mask[in_head] = top_mask(vector[in_head], density)
    return mask
