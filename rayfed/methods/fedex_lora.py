"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): the mean of factors, and what it misses goes into the base.

    B <- Bbar = sum_k p_k B_k,   A <- Abar = sum_k p_k A_k                      as in FedIT
    W <- W + D - s Bbar Abar,    D = s sum_k p_k B_k A_k                        the residual, merged into the base

so that the global change ``W + s B A`` is the exact mean of products. Ranks are equal. The residual is a covariance,

    D - s Bbar Abar = s sum_{k < K} p_k (B_k - Bbar) (A_k - A_K)                for sum_k p_k (B_k - Bbar) = 0

and is sent that way: rank (K - 1) r, where the stack of D beside Bbar has the (K + 1) r that papers quote, and without
the cancellation of two large products. Up: r (out + in) a layer. Down: r (out + in), and as news for every client the
residual, (K - 1) r (out + in). With `rank_cap` it is cut to its leading singular directions; what is cut is lost
for good, for the base gets only what is sent.

The equations come from a collection, the covariance is derived from them; the paper's own text was not at hand.
Downloads are neither sparse nor rounded: the identity needs one start for all, and most of the traffic is residual.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed.errors import allowed
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add, norm, stack, truncate
from rayfed.methods._state import Global, Layered, advance_head, pairs
from rayfed.methods.base import Advance, Profile, Start, Update, fedavg, mean_change
from rayfed.methods.flora import flat, ranks_report


@dataclass(frozen=True)
class FedExLoRA(Layered):
    """Average the factors and merge the residual into the base."""

    rank_cap: int | None = None
    """The largest rank of residual to send and merge, 1 or more; None, the default, is the exact method: no limit."""

    sparse_down = False

    def __post_init__(self) -> None:
        if self.rank_cap is not None and (type(self.rank_cap) is not int or self.rank_cap < 1):
            raise allowed("method.rank_cap", self.rank_cap, "it must be a whole number of 1 or more, or null")

    def init(self, adapter: Adapter, seed: int) -> Global:
        base = {name: torch.zeros(pair.B.shape[0], pair.A.shape[1]) for name, pair in adapter.layers.items()}
        return Global(dict(adapter.layers), dict(adapter.head), base=base)

    def broadcast(self, state: Global, client: Profile) -> Start:
        adapter = Adapter(pairs(state), state.head)
        return Start(adapter.flatten(), adapter.layout, base=state.base)

    def aggregate(self, state: Global, updates: Iterable[Update], advance: Advance = fedavg) -> Global:
        """Holds the factors of the whole cohort: they make the news."""
        cohort, now = list(updates), Adapter(pairs(state), state.head)
        change = now.layout.unflatten(mean_change(cohort, now.layout.size))
        trained, total = [update.trained for update in cohort], sum(update.weight for update in cohort)
        shares = [update.weight / total for update in cohort]
        layers, sent, missed, cut = {}, {}, 0.0, 0.0
        for name, pair in now.layers.items():
            mean = LowRank(pair.B + change.layers[name].B, pair.A + change.layers[name].A, pair.scale)
            whole = residual(mean, [adapter.layers[name] for adapter in trained], shares)
            layers[name], sent[name] = mean, self._capped(whole)
            energy = norm(whole) ** 2
            missed += energy
            cut += energy - norm(sent[name]) ** 2
        return replace(
            state,
            layers=layers,
            head=advance_head(state.head, change.head, advance),
            rounds=state.rounds + 1,
            base={name: add(W, sent[name]) for name, W in state.base.items()},
            extras={"news": flat(sent)},
            report={"residual_norm": missed**0.5, "residual_lost": max(cut, 0.0) ** 0.5, **ranks_report(sent)},
        )

    def _capped(self, whole: LowRank) -> LowRank:
        if self.rank_cap is None or whole.rank <= self.rank_cap:
            return whole
        cut = truncate(whole, self.rank_cap, 1.0, dtype=torch.float64)
        # Row by row in memory, as clients decode it: their merge then has the server's bits.
        return LowRank(cut.B.float().contiguous(), cut.A.float().contiguous(), 1.0)

    def base_update(self, state: Global) -> Tensor | None:
        return state.extras.get("news")

    def delta(self, state: Global, layer: str) -> Tensor:
        return add(state.base[layer], pairs(state)[layer])


def residual(mean: LowRank, trained: Sequence[LowRank], shares: Sequence[float]) -> LowRank:
    """``sum_k p_k s B_k A_k - s Bbar Abar`` as a pair of rank (K - 1) r; ``mean`` holds the means of the factors."""
    *others, last = trained
    if not others:  # one client: its factors are the mean
        return LowRank(mean.B[:, :0], mean.A[:0], 1.0)
    return stack([LowRank(pair.B - mean.B, pair.A - last.A, pair.scale) for pair in others], shares[:-1])
