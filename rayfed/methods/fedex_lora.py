"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): average the factors, and put what that misses into the base.

    B <- Bbar = (1/K) sum_k B_k,   A <- Abar = (1/K) sum_k A_k                  as in FedIT, with uniform weights
    W <- W + D - s Bbar Abar,      D = s (1/K) sum_k B_k A_k                    the residual, merged into the base

So the global change ``W + s B A`` is exactly the mean of products. Ranks are equal. The residual is a covariance:

    D - s Bbar Abar = s sum_{k < K} p_k (B_k - Bbar) (A_k - A_K)                since sum_k p_k (B_k - Bbar) = 0

It is sent in that form, of rank (K - 1) r, and no two large products cancel. Up: r (out + in) entries a layer. Down:
r (out + in), and for every client the residual, (K - 1) r (out + in): in all K r (out + in). `rank_cap` cuts the
residual to its leading singular directions. The base gets only what is sent, so what is cut is lost for good.

Downloads are neither sparse nor rounded: the identity needs one start for all clients, and most of the traffic is the
residual.

Fed-TaLoRA (Yu, Hu and Min, arXiv 2505.12318; the name `fed_talora`) has the same rounds, as far as its abstract says:
one adapter for clients that meet new classes over time, whose factors are averaged, and a residual that corrects the
mean. The classes come by `partition.sequence`, with any method. How the paper sends the residual is unknown.

Source: authors' code read; deviates: the residual as a covariance, of rank (K - 1) r where the code has K r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add, norm, stack, truncate
from rayfed.methods import Advance, LayerMethod, LayerState, Source, Updates, fedavg, mean_change
from rayfed.methods._base_updates import flat, ranks_report
from rayfed.methods._layers import zero_base


@dataclass(frozen=True)
class FedExLoRA(LayerMethod):
    """Average the factors and merge the residual into the base."""

    rank_cap: PositiveInt | None = None
    """The largest rank of the residual that is sent and merged. null, the exact method: no limit."""

    paper = "arXiv 2410.09432"
    summary = "average the factors, put what that misses into the base"
    traffic_down = "K r (in + out)"
    source: ClassVar[Source] = "authors' code read"
    weights = "uniform"
    averages = "products"
    refuses_privacy = "its residual is a covariance of the single uploads"
    sparse_down = False

    def init(self, adapter: Adapter, seed: int) -> LayerState:
        return LayerState(layers=dict(adapter.layers), head=dict(adapter.head), base=zero_base(adapter))

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        """Holds the factors of the whole cohort: the residual is made of them."""
        cohort, layout = list(updates), Adapter(state.pairs, state.head).layout
        change = layout.unflatten(mean_change(cohort, layout.size))
        trained, total = [update.trained for update in cohort], sum(update.weight for update in cohort)
        shares = [update.weight / total for update in cohort]
        layers, sent, missed, cut = {}, {}, 0.0, 0.0
        for name, pair in state.pairs.items():
            layers[name] = LowRank(pair.B + change.layers[name].B, pair.A + change.layers[name].A, pair.scale)
            whole = residual(layers[name], [adapter.layers[name] for adapter in trained], shares)
            sent[name] = self._capped(whole)
            energy = norm(whole) ** 2
            missed += energy
            cut += energy - norm(sent[name]) ** 2
        return state.next_with_head(
            advance,
            change.head,
            layers=layers,
            base={name: add(W, sent[name]) for name, W in state.base.items()},
            extras={"news": flat(sent)},
            report={"residual_norm": missed**0.5, "residual_lost": max(cut, 0.0) ** 0.5, **ranks_report(sent)},
        )

    def _capped(self, whole: LowRank) -> LowRank:
        if self.rank_cap is None or whole.rank <= self.rank_cap:
            return whole
        cut = truncate(whole, self.rank_cap, 1.0, dtype=torch.float64)
        # Row by row in memory, as clients decode it. Then their merge has the server's bits.
        return LowRank(cut.B.float().contiguous(), cut.A.float().contiguous(), 1.0)


def residual(mean: LowRank, trained: Sequence[LowRank], shares: Sequence[float]) -> LowRank:
    """``sum_k p_k s B_k A_k - s Bbar Abar`` as a pair of rank (K - 1) r. ``mean`` holds the means of the factors."""
    *others, last = trained
    if not others:  # one client: its factors are the mean
        return LowRank(mean.B[:, :0], mean.A[:0], 1.0)
    return stack([LowRank(pair.B - mean.B, pair.A - last.A, pair.scale) for pair in others], shares[:-1])
