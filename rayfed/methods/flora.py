"""FLoRA (Wang et al., arXiv 2409.05976): fresh factors each round, stacked and merged into the base; nothing is lost.

The global model is only the base: W (out, in) in addition to the pretrained weight. In round t:

    A_k = A^t[:r_k],  B_k = 0            every client starts anew; A^t is drawn from the run's seed, layer and round
    B_k, A_k                             both train, on the base W
    B_st = [B_1 | ... | B_K],  A_st = [p_1 s_1 A_1; ...; p_K s_K A_K]
    W   <- W + B_st A_st = W + sum_k p_k s_k B_k A_k                            the exact mean of products

Up: r_k (out + in) a layer. Down: only the head, and then for every client the stack: R (out + in) a layer, with
``R = sum_k r_k``. A client that missed rounds needs their stacks too. Ranks may be mixed. No options.

The start is known and the stack is sent whole. So downloads are neither sparse nor rounded.

Source: secondary; deviates: the clients of a round share one A^t, and a smaller rank takes its first rows. Then the
seed stands for all of A, and neither A nor B = 0 costs anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add, stack
from rayfed.methods import Advance, HeadMean, LayerMethod, LayerState, Profile, Source, Start, Updates, fedavg
from rayfed.methods._base_updates import flat, fresh_A, initial_factors, ranks_report


class FLoRA(LayerMethod):
    """Stack the clients' factors and merge the stack into the base. No options."""

    paper = "arXiv 2409.05976"
    summary = "fresh factors each round; their stack is merged into the base"
    traffic_down = "sum_k r_k (in + out)"
    traffic_up = "r_k (in + out)"
    source: ClassVar[Source] = "secondary"
    refuses_privacy = "it stacks the single uploads"
    averages = "products"
    mixed_ranks = True
    sparse_down = False

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        base = {name: pair.dense().float() for name, pair in adapter.layers.items()}
        rank = max((pair.rank for pair in adapter.layers.values()), default=0)
        merged = initial_factors(adapter)
        news = {"news": self.flat(merged)} if merged else {}
        return LayerState(head=dict(adapter.head), base=base, extras=news, notes={"seed": seed, "rank": rank})

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        layers = {}
        for name, W in state.base.items():
            out, inner = W.shape
            A = fresh_A(state.notes["seed"], name, state.rounds, state.notes["rank"], inner)[: client.rank]
            layers[name] = LowRank(torch.zeros(out, client.rank), A, client.scale)
        return Start.of(Adapter(layers, state.head), "A", "B", base=state.base)

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        """Holds the factors of the whole cohort: they are the base update."""
        mean, trained = HeadMean(), []
        for update in updates:
            mean.count(update.weight, update)
            trained.append(update.trained.layers)  # a trained product is all change: it started from B = 0
        shares = mean.shares()
        factors = {name: self.condense(stack([pairs[name] for pairs in trained], shares)) for name in state.base}
        return state.next_with_head(
            advance,
            mean.head(),
            base={name: add(W, factors[name]) for name, W in state.base.items()},
            extras={"news": self.flat(factors)},
            report=ranks_report(factors),
        )

    def condense(self, stacked: LowRank) -> LowRank:
        """What of a layer's stack is sent and merged: here all of it."""
        return stacked

    def flat(self, factors: Mapping[str, LowRank]) -> Tensor:
        """The base update as one vector (m,). R is the same for all layers, so m tells R."""
        return flat(factors)
