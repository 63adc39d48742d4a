"""raFLoRA (arXiv 2602.13486): FlexLoRA, with each rank averaged over the clients that have it.

q_j is the weight of this round's clients of rank j or more. b_kj and a_kj are column j of B_k and row j of A_k:

    D = sum_j sum_{k: r_k >= j} (p_k / q_j) s_k b_kj a_kj

Then the SVD of D and its truncations follow, as in `FlexLoRA`; traffic is the same. These are RBLA's weights, on
products instead of factors. A rank that few clients have is not averaged with zeros for the others, and without local
training D does not decay. q_j is the same for all ranks between two neighbouring client ranks: the paper's bands.

``orphans`` says what happens to a band that no client of the round has. What a sparse or rounded download leaves out is
not lost, as in `FlexLoRA`. The cohort's factors are in memory together, since q_j is known only when all are in.

Source: secondary; deviates: `orphans`. The equation drops such a band; whether the paper does is unknown. In a pilot
keeping it was far better when few clients take part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from rayfed.lora.adapter import LowRank
from rayfed.methods import Advance, LayerState, ProductMean, Updates, fedavg
from rayfed.methods._means import positive
from rayfed.methods._truncation import Truncating, spectrum


@dataclass(frozen=True)
class RaFLoRA(Truncating):
    """The mean of products, each rank over its owners, redistributed by SVD."""

    orphans: Literal["keep", "zero"] = "keep"
    """Singular triples after the largest rank of the round's clients: kept as they are, or dropped."""

    paper = "arXiv 2602.13486"
    summary = "FlexLoRA with weights by rank band"
    traffic_down = traffic_up = "r_k (in + out)"
    source = "secondary"
    refuses_privacy = "each rank is divided by the weight of the clients of the cohort that have it"

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        cohort = [update for update in updates if update.weight > 0]
        total = positive(sum(update.weight for update in cohort))
        owned = torch.zeros(max(update.client.rank for update in cohort), dtype=torch.float64)
        for update in cohort:
            owned[: update.client.rank] += update.weight / total

        mean, products = ProductMean(), self.client_products(state)
        for update in cohort:
            share, rank = update.weight / total, update.client.rank
            mean.count(share, update)
            for name, pair in products(update).items():
                # `trained_product`: column j of B belongs to rank j modulo the client's rank.
                column = (share / owned[:rank]).float().repeat(pair.rank // rank)
                mean.add_product(name, 1.0, replace(pair, B=pair.B * column))
        n = len(owned)
        for name in state.layers if self.orphans == "keep" else ():
            orphan = spectrum(state, name)
            if orphan.rank > n:
                mean.add_product(name, 1.0, LowRank(orphan.U[:, n:] * orphan.S[n:], orphan.Vh[n:], 1.0))
        layers = {name: mean.layer(name) for name in state.layers}
        return self.next(state, mean, advance, layers, owned_least=float(owned[-1]))
