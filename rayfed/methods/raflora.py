"""raFLoRA (arXiv 2602.13486): FlexLoRA, with each rank averaged over the clients that have it.

With q_j the weight of this round's clients of rank j or more, b_kj and a_kj column j of B_k and row j of A_k,

    D = sum_j sum_{k: r_k >= j} (p_k / q_j) s_k b_kj a_kj

then the SVD of D and its truncations, as in `FlexLoRA`; traffic is the same. These are RBLA's weights, put on products
instead of factors: a rank that few clients have is no longer averaged with the nothing of all the others, and without
local training D does not decay. q_j is the same for all ranks between two neighbouring client ranks: the paper's bands.

A band that no client of the round has: ``orphans=keep`` leaves its singular triples in D, ``zero`` drops them, as the
bare equation does. A pilot found keeping far better when few clients take part; which of the two the paper means is
not known here. The equations are as collected there, the paper's own text was not at hand. What a sparse or rounded
download leaves out is kept as in `FlexLoRA`. The cohort's factors are in memory together: q_j is known when all are in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods._state import Global, ProductMean, advance_head
from rayfed.methods._truncation import Meant, Truncating, decomposed, spectrum, truncation_report
from rayfed.methods.base import Advance, Update, fedavg


@dataclass(frozen=True)
class RaFLoRA(Truncating):
    """The mean of products, each rank over its owners, redistributed by SVD."""

    orphans: Literal["keep", "zero"] = "keep"
    """Singular triples past the largest rank of the round's clients: kept as they are, or dropped."""

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        cohort = [update for update in updates if update.weight > 0]
        if not cohort:
            raise ValueError("no update with a positive weight to aggregate")
        ranks, weights = ([u.client.rank for u in cohort], [u.weight for u in cohort])
        whole, owned = sum(weights), torch.zeros(max(ranks), dtype=torch.float64)
        for rank, weight in zip(ranks, weights):
            owned[:rank] += weight / whole

        total, meant = ProductMean(), Meant(self, state)
        for update, rank, weight in zip(cohort, ranks, weights):
            share = weight / whole
            total.add(share, Adapter({}, update.layout.unflatten(update.change).head))
            for name, pair in meant.trained_product(update).items():
                # One column of B for each rank, or as many again where the wire kept something back.
                column = (share / owned[:rank]).float().repeat(pair.rank // rank)
                total.add_pair(name, 1.0, replace(pair, B=pair.B * column))
        if self.orphans == "keep":
            for name in state.layers:
                orphan = spectrum(state, name)
                if orphan.rank > len(owned):
                    U, S, Vh = orphan.U[:, len(owned) :], orphan.S[len(owned) :], orphan.Vh[len(owned) :]
                    total.add_pair(name, 1.0, LowRank(U * S, Vh, 1.0))
        report = {**truncation_report(state, ranks), "owned_least": float(owned[-1])}
        head = advance_head(state.head, total.head(), advance)
        state = replace(state, head=head, rounds=state.rounds + 1, report=report)
        return decomposed(state, {name: total.layer(name) for name in state.layers})
