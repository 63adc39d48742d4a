"""RBLA (arXiv 2408.08699): rank by rank, the mean over the clients that have the rank.

With q_j the weight of this round's clients of rank j or more,

    B[:, j] <- sum_{k: r_k >= j} p_k B_k[:, j] / q_j        A[j] likewise; a rank that nobody has keeps its value

so that a client's missing ranks do not pull the global ones to zero, as zero padding does (`HetLoRA`). It is a mean of
factors, not of products. Traffic is r_k (in + out) entries a layer both ways; how a client is cut out of the global
factors, and how its scale counts, says `rayfed.methods._nested_ranks`. The server step may have a rate; momentum would move
ranks that nobody has. No options. The equation comes from a collection; the paper's own text was not at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rayfed.lora.adapter import LowRank
from rayfed.methods._nested_ranks import Nested, RankwiseMean
from rayfed.methods._state import Global, advance_head, pairs
from rayfed.methods.base import Advance, Update, fedavg


@dataclass(frozen=True)
class RBLA(Nested):
    """Average each rank over its owners. No options."""

    optimizers = ("fedavg", "sgd")

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        sums = RankwiseMean(state)
        for update in updates:
            sums.add(update.weight, update)
        head = advance_head(state.head, sums.head(), advance)
        layers, owned = {}, 1.0
        for name, pair in pairs(state).items():
            B, A, q = sums.means(name)
            share = q.where(q > 0, 1.0)  # where nobody owns a rank its changes are zero, whatever they are divided by
            layers[name] = LowRank(
                advance(f"B.{name}", pair.B, (B / share).float()),
                advance(f"A.{name}", pair.A, (A / share[:, None]).float()),
                pair.scale,
            )
            owned = min(owned, float(q.min()))
        return replace(state, layers=layers, head=head, rounds=state.rounds + 1, report={"owned_least": owned})
