"""FLoRA (Wang et al., arXiv 2409.05976): fresh factors each round, stacked and merged into the base; nothing is lost.

The global model is the base alone, W (out, in) beside the pretrained weight. In round t:

    A_k = A^t[:r_k],  B_k = 0            every client starts anew; A^t is drawn from the run's seed, layer and round
    B_k, A_k                             trained, both, on the base W
    B_st = [B_1 | ... | B_K],  A_st = [p_1 s_1 A_1; ...; p_K s_K A_K]
    W   <- W + B_st A_st = W + sum_k p_k s_k B_k A_k                            the exact mean of products

Up: r_k (out + in) a layer. Down: nothing but the head, and then, as news for every client, the stack: R (out + in) a
layer with ``R = sum_k r_k``. A client that missed rounds needs the stacks of these too. No options; ranks may be mixed.

The equations come from a collection; the paper's own text was not at hand. Ours is that the clients of a round share
one A^t, of which a smaller rank takes the first rows: the seed stands for all of it, and A and B = 0 cost nothing. As
the start is known and the stack is sent whole, downloads are neither sparse nor rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add, stack
from rayfed.methods._state import Global, Layered, ProductMean, advance_head
from rayfed.methods.base import Advance, Profile, Start, Update, fedavg
from rayfed.seeding import torch_rng


@dataclass(frozen=True)
class FLoRA(Layered):
    """Stack the clients' factors and merge the stack into the base. No options."""

    mixed_ranks = True
    sparse_down = False

    def init(self, adapter: Adapter, seed: int) -> Global:
        base = {name: pair.dense().float() for name, pair in adapter.layers.items()}
        rank = max((pair.rank for pair in adapter.layers.values()), default=0)
        return Global(head=dict(adapter.head), base=base, notes={"seed": seed, "rank": rank})

    def broadcast(self, state: Global, client: Profile) -> Start:
        layers = {}
        for name, W in state.base.items():
            out, inner = W.shape
            A = fresh_A(state.notes["seed"], name, state.rounds, state.notes["rank"], inner)[: client.rank]
            layers[name] = LowRank(torch.zeros(out, client.rank), A, client.scale)
        adapter = Adapter(layers, state.head)
        return Start(adapter.flatten(), adapter.layout, known=adapter.layout.mask("A", "B"), base=state.base)

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        """Holds the factors of the whole cohort: they are the news."""
        heads, weights = ProductMean(), []
        pairs: dict[str, list[LowRank]] = {name: [] for name in state.base}
        for update in updates:
            heads.add(update.weight, Adapter({}, update.layout.unflatten(update.change).head))
            weights.append(update.weight)
            # All of a trained product was learned in this round: it started from B = 0.
            for name, pair in update.trained.layers.items():
                pairs[name].append(pair)
        head = advance_head(state.head, heads.head(), advance)
        shares = [weight / heads.weight for weight in weights]
        factors = {name: self.condense(stack(pairs[name], shares)) for name in state.base}
        return replace(
            state,
            head=head,
            rounds=state.rounds + 1,
            base={name: add(W, factors[name]) for name, W in state.base.items()},
            extras={"news": self.announce(factors)},
            report=ranks_report(factors),
        )

    def condense(self, stacked: LowRank) -> LowRank:
        """What of a layer's stack is sent and merged: here all of it."""
        return stacked

    def announce(self, factors: Mapping[str, LowRank]) -> Tensor:
        """The news: R is the same for all layers, so its length tells it."""
        return flat(factors)

    def base_update(self, state: Global) -> Tensor | None:
        return state.extras.get("news")

    def delta(self, state: Global, layer: str) -> Tensor:
        return state.base[layer]


def fresh_A(seed: int, layer: str, t: int, rank: int, inner: int) -> Tensor:
    """A layer's A (rank, inner) for round t, uniform in +-1/sqrt(inner) as `fresh_adapter` draws it.

    Draw the largest rank and cut: only then do smaller ranks hold the first rows of the larger.
    """
    bound = 1 / math.sqrt(inner)
    return torch.empty(rank, inner).uniform_(-bound, bound, generator=torch_rng(seed, "lora.A", layer, t))


def flat(factors: Mapping[str, LowRank]) -> Tensor:
    """B, then A, of every layer by name, as one float32 vector: what a client merges, product by product (scale 1)."""
    tensors = [tensor for name in sorted(factors) for tensor in (factors[name].B, factors[name].A)]
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors]) if tensors else torch.zeros(0)


def ranks_report(factors: Mapping[str, LowRank]) -> dict[str, float]:
    """The ranks of what is sent to everybody: their mean and the largest."""
    ranks = [pair.rank for pair in factors.values()] or [0]
    return {"news_rank_mean": sum(ranks) / len(ranks), "news_rank_max": float(max(ranks))}
