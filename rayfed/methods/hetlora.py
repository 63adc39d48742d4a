"""HetLoRA (arXiv 2401.06432): factors cut to each client's rank, zero-padded means, and ranks that prune themselves.

With q_j the weight of this round's clients of rank j or more, and g = ``gamma``,

    down     B_k, A_k = the first r_k ranks of B, A
    local    loss + regularizer ||B_k[:, g r_k:]|| ||A_k[g r_k:, :]||       summed over layers
    prune    r_k <- floor(g r_k), at least 1, if that tail is smaller after training than before
    up       B[:, j] <- sum_{k: r_k >= j} p_k B_k[:, j],   A[j] likewise    a missing rank counts as zero
             p_k ~ ||s_k B_k A_k||_F over all layers

As an index that not all clients have is averaged with zeros, it shrinks by q_j in either factor and by q_j^2 in the
product a round, were there no training; `RBLA` divides by q_j instead. An index that shrank to nothing on both sides
(none of a round's clients had it) gets its row of the run's first A back, so that it can be trained again.

Plain zero padding, which other papers compare with as HetLoRA, is ``weighting=given regularizer=0 prune=false``; the
defaults are the full method. With pruning each client has a rank of its own, kept between rounds, and gets a payload of
its own. A pruned client keeps its scale: dropping ranks must not rescale those that stay. How factors are cut out and
how scales count says `rayfed.methods._nested_ranks`. Traffic is r_k (in + out) entries a layer both ways.

The equations come from a collection; the paper's own text was not at hand. Left open there, decided here: the
regulariser's default weight; one rank for all layers of a client, and so one tail, summed over them; a new rank counts
from the client's next round on; where no client has a product yet the weights are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rayfed.errors import allowed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import norm, revive
from rayfed.methods._nested_ranks import Nested, RankwiseMean
from rayfed.methods._state import Global, advance_head, pairs
from rayfed.methods.base import Advance, Profile, Trainable, Update, fedavg
from rayfed.objectives.tail_penalty import TailPenalty

NOTHING = 1e-12  # added to every norm: equal weights where no client has a product yet


@dataclass(frozen=True)
class HetLoRA(Nested):
    """Zero-padded means of factors, with norm weights, a regularised tail and self-pruning ranks."""

    weighting: Literal["norm", "given"] = "norm"
    """Weights of the clients: the norms of their products, as in the paper; or the server's (`server.weights`)."""
    regularizer: float = 1e-3
    """Weight of the tail's norms in the local loss; 0 or more. The default is ours."""
    prune: bool = True
    """Whether a client drops the tail of its ranks when training made it smaller."""
    gamma: float = 0.99
    """Share of a client's ranks before the tail, which has at least one rank; over 0 and under 1. The paper's value."""

    def __post_init__(self) -> None:
        if not 0 <= self.regularizer < math.inf:
            raise allowed("method.regularizer", self.regularizer, "it must be 0 or more, and finite")
        if not 0 < self.gamma < 1:
            raise allowed("method.gamma", self.gamma, "it must be over 0 and under 1; prune=false prunes nothing")

    @property
    def personal(self) -> bool:  # type: ignore[override]
        """Ranks that prune themselves differ within a tier."""
        return self.prune

    def rank(self, state: Global, client: Profile) -> int:
        kept = state.clients.get(client.client, {}).get("rank")
        return client.rank if kept is None else min(client.rank, int(kept))

    def trainable(self, state: Global, client: Profile) -> Trainable:
        rank = self.rank(state, client)
        keep = self._keep(rank)
        penalty = TailPenalty(self.regularizer, keep) if self.regularizer and keep < rank else None
        return Trainable(objective=penalty)

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        sums, weights, ranks, clients = RankwiseMean(state), [], [], dict(state.clients)
        for update in updates:
            weights.append(self._weight(update))
            sums.add(weights[-1], update)
            rank = self.rank(state, update.client)
            keep = self._keep(rank)
            if self.prune and _tail(update.trained, keep) < _tail(update.sent, keep):
                clients[update.client.client] = {"rank": torch.tensor([rank := keep])}
            ranks.append(rank)
        head = advance_head(state.head, sums.head(), advance)
        layers = {}
        for name, pair in pairs(state).items():
            B, A, q = sums.means(name)
            mean = LowRank((q * pair.B + B).float(), (q[:, None] * pair.A + A).float(), pair.scale)
            layers[name] = revive(mean, state.extras[f"A.{name}"])
        shares = [weight / sum(weights) for weight in weights]
        report = {
            "weights_max": max(shares),
            "effective_cohort": 1 / math.fsum(share**2 for share in shares),
            "rank_mean": sum(ranks) / len(ranks),
        }
        return replace(state, layers=layers, head=head, rounds=state.rounds + 1, clients=clients, report=report)

    def _keep(self, rank: int) -> int:
        """The ranks before the tail: floor(gamma rank), at least 1."""
        # gamma * rank may be a rounding under the whole number it is.
        return max(1, math.floor(self.gamma * rank + 1e-9))

    def _weight(self, update: Update) -> float:
        """p_k, before it is divided by the cohort's sum. An update that the server gives no weight has none here."""
        if self.weighting == "given" or update.weight <= 0:
            return update.weight
        return math.hypot(*(norm(pair) for pair in update.trained.layers.values())) + NOTHING


def _tail(adapter: Adapter, keep: int) -> float:
    """``||B[:, keep:]|| ||A[keep:]||``, summed over layers."""
    return math.fsum(
        float(pair.B[:, keep:].double().norm() * pair.A[keep:].double().norm()) for pair in adapter.layers.values()
    )
