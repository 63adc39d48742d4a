"""HetLoRA (Cho et al., arXiv 2401.06432): factors cut to each client's rank, zero-padded means, self-pruning ranks.

q_j is the weight of this round's clients of rank j or more, and g = ``gamma``:

    down     B_k, A_k = the first r_k ranks of B, A
    local    loss + regularizer ||B_k[:, g r_k:]|| ||A_k[g r_k:, :]||       summed over layers
    prune    r_k <- floor(g r_k), at least 1, if that tail is smaller after training than before
    up       B[:, j] <- sum_{k: r_k >= j} p_k B_k[:, j],   A[j] likewise    a missing rank counts as zero
             p_k ~ ||s_k B_k A_k||_F over all layers

An index that not all clients have is averaged with zeros. So without training it shrinks by q_j a round in either
factor, and by q_j^2 in the product; `RBLA` divides by q_j instead. If an index shrinks to nothing on both sides,
because no client of a round had it, it gets its row of the run's first A back. Then it can train again.

Plain zero padding, which other papers call HetLoRA, is ``weighting=given regularizer=0 prune=false``. The defaults are
the full method. With pruning each client has a rank of its own, stored between rounds, and gets a payload of its own. A
pruned client keeps its scale: to drop ranks must not rescale the others. `rayfed.methods._nested_ranks` says how
factors are cut and how scales count. Traffic is r_k (in + out) entries a layer both ways.

Source: secondary; deviates: open there and decided here are the regulariser's default weight; one rank for all layers
of a client, and so one tail, summed over them; a new rank counts from the client's next round on; equal weights where
no client has a product yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import norm, revive
from rayfed.methods import Advance, LayerState, Profile, Trainable, Update, Updates, fedavg
from rayfed.methods._nested_ranks import Nested, RankwiseMean
from rayfed.objectives.tail_penalty import TailPenalty

NOTHING = 1e-12  # added to every norm: equal weights where no client has a product yet


@dataclass(frozen=True)
class HetLoRA(Nested):
    """Zero-padded means of factors, with norm weights, a regularised tail and self-pruning ranks."""

    weighting: Literal["norm", "given"] = "norm"
    """Weights of the clients. `norm`: the norms of their products, as in the paper. `given`: `server.weights`."""
    regularizer: NonNegativeFloat = 1e-3
    """Weight of the tail's norms in the local loss. The default is ours."""
    prune: bool = True
    """Whether a client drops the tail of its ranks when training made the tail smaller."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of a client's ranks before the tail, which has at least one rank. Default: the paper's."""

    paper = "arXiv 2401.06432"
    summary = "truncate, zero-pad, weigh by norm, prune ranks"
    traffic_down = traffic_up = "r_k (in + out)"
    source = "secondary"
    refuses_privacy = "its weights are norms of the uploads, divided by their sum over the cohort"

    @property
    def personal(self) -> bool:  # type: ignore[override]
        """Ranks that prune themselves differ within a tier."""
        return self.prune

    @property
    def secure_aggregation(self) -> bool:  # type: ignore[override]
        """Weights by norm and self-pruned ranks are known only after the uploads were seen."""
        return self.weighting == "given" and not self.prune

    @property
    def ignores_weights(self) -> str:  # type: ignore[override]
        return "" if self.weighting == "given" else "its own weights are norms; method.weighting=given takes these"

    def rank(self, state: LayerState, client: Profile) -> int:
        stored = state.clients.get(client.client, {}).get("rank")
        return client.rank if stored is None else min(client.rank, int(stored))

    def trainable(self, state: LayerState, client: Profile) -> Trainable:
        rank = self.rank(state, client)
        start = self._tail_start(rank)
        return Trainable(objective=TailPenalty(self.regularizer, start) if self.regularizer and start < rank else None)

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        sums, ranks, clients = RankwiseMean(state), [], dict(state.clients)
        for update in updates:
            sums.add(self._weight(update), update)
            rank = self.rank(state, update.client)
            start = self._tail_start(rank)
            if self.prune and _tail(update.trained, start) < _tail(update.sent, start):
                clients[update.client.client] = {"rank": torch.tensor([rank := start])}
            ranks.append(rank)
        layers = {}
        for name, pair in state.pairs.items():
            B, A, q = sums.means(name)
            mean = LowRank((q * pair.B + B).float(), (q[:, None] * pair.A + A).float(), pair.scale)
            layers[name] = revive(mean, state.extras[f"A.{name}"])
        report = {**sums.weights_report(), "rank_mean": sum(ranks) / len(ranks)}
        return state.next_with_head(advance, sums.head(), layers=layers, clients=clients, report=report)

    def _tail_start(self, rank: int) -> int:
        """The ranks before the tail: floor(gamma rank), at least 1."""
        # gamma * rank may be a rounding below the whole number that it is.
        return max(1, math.floor(self.gamma * rank + 1e-9))

    def _weight(self, update: Update) -> float:
        """p_k, not yet divided by the cohort's sum. It is 0 if the server gives the update no weight."""
        if self.weighting == "given" or update.weight <= 0:
            return update.weight
        return math.hypot(*(norm(pair) for pair in update.trained.layers.values())) + NOTHING


def _tail(adapter: Adapter, start: int) -> float:
    """``||B[:, start:]|| ||A[start:]||``, summed over layers."""
    return math.fsum(
        float(pair.B[:, start:].double().norm() * pair.A[start:].double().norm()) for pair in adapter.layers.values()
    )
