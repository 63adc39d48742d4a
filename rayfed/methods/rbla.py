"""RBLA (arXiv 2408.08699): rank by rank, the mean over the clients that have the rank.

q_j is the weight of this round's clients of rank j or more:

    B[:, j] <- sum_{k: r_k >= j} p_k B_k[:, j] / q_j        A[j] likewise; a rank that no client has keeps its value

So a client's missing ranks do not pull the global ones to zero, as zero padding does (`HetLoRA`). It is a mean of
factors, not of products. Traffic is r_k (in + out) entries a layer both ways. `rayfed.methods._nested_ranks` says how a
client is cut out of the global factors, and how its scale counts. The server step may have a rate; momentum would move
ranks that no client has. No options.

Source: secondary; deviates: each client's own scale counts.
"""

from __future__ import annotations

from rayfed.lora.adapter import LowRank
from rayfed.methods import Advance, LayerState, Updates, fedavg
from rayfed.methods._nested_ranks import Nested, RankwiseMean


class RBLA(Nested):
    """Average each rank over its owners. No options."""

    paper = "arXiv 2408.08699"
    summary = "average every rank index over the clients that own it"
    traffic_down = traffic_up = "r_k (in + out)"
    source = "secondary"
    optimizers = ("fedavg", "sgd")
    secure_aggregation = True
    refuses_privacy = "each rank is divided by the weight of the clients of the cohort that have it"

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        sums = RankwiseMean(state)
        for update in updates:
            sums.add(update.weight, update)
        layers, owned = {}, 1.0
        for name, pair in state.pairs.items():
            B, A, q = sums.means(name)
            share = q.where(q > 0, 1.0)  # a rank that no client owns has changes of zero, whatever divides them
            layers[name] = LowRank(
                advance(f"B.{name}", pair.B, (B / share).float()),
                advance(f"A.{name}", pair.A, (A / share[:, None]).float()),
                pair.scale,
            )
            owned = min(owned, float(q.min()))
        return state.next_with_head(advance, sums.head(), layers=layers, report={"owned_least": owned})
