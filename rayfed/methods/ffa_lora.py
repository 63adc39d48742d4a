"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays as it was drawn and only B trains, so the mean of factors is exact.

    B <- sum_k p_k B_k,   A = A_0   =>   s B A_0 = sum_k p_k s B_k A_0

Only B and the head travel, r out entries a layer both ways; A_0 comes from the run's seed.

Mixed ranks are nested. Client k has the first r_k rows of A_0 and, under its own scale s_k, the first columns of B:

    down    B_k = (s / s_k) B[:, :r_k]                              its product is s B[:, :r_k] A_0[:r_k]
    B     <- advance(B, sum_k p_k (s_k / s) [dB_k | 0])             dB_k: its change of what it decoded

That moves ``s B A_0`` by exactly ``sum_k p_k s_k dB_k A_0[:r_k]``. Because changes are averaged, not values, B keeps
its entries where a client has no rank or received nothing. With equal ranks and dense downloads it is the equation
above. A_0 never changes, so B's entries mean the same in every round and any server optimizer may act on them.

With ``missing=zero`` it is the mean of zero-padded values, of which other papers speak: a rank that a client lacks
counts as zero. So it shrinks by the weight q_j of the clients that have it, without any training:

    B[:, j] <- q_j B[:, j] + sum_{k: r_k > j} p_k (s_k / s) dB_k[:, j]

Source: secondary; deviates: nothing known for equal ranks; nested ranks are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rayfed.methods import HeadMean, LayerMethod, LayerState
from rayfed.methods._nested_ranks import nested
from rayfed.methods.base import ANY_OPTIMIZER, Advance, Profile, Start, Trainable, Updates, fedavg


@dataclass(frozen=True)
class FFALoRA(LayerMethod):
    """Freeze A, average B."""

    missing: Literal["unmoved", "zero"] = "unmoved"
    """What a rank counts as that a client lacks: `unmoved`, by the mean of changes; or `zero`, by the mean of
    zero-padded values. The default is ours. With equal ranks both are the same.
    """

    paper = "arXiv 2403.12313"
    summary = "A frozen and shared; average B"
    traffic_down = traffic_up = "r_k out"
    source = "secondary"
    refuses_adapter: ClassVar[str] = "A is drawn from the seed and never travels"
    optimizers: ClassVar[tuple[str, ...]] = ANY_OPTIMIZER
    mixed_ranks = True
    fixed_gauge = True
    secure_aggregation = True
    mixing: ClassVar[Literal["exact"] | None] = "exact"
    refuses_privacy = "a rank that a client lacks counts as zero, so the sum of changes is not enough"

    @property
    def summed(self) -> Literal["changes"] | None:  # type: ignore[override]
        """The mean of values also needs the clients' ranks."""
        return "changes" if self.missing == "unmoved" else None

    @property
    def factor(self) -> Literal["B", "A"]:
        """The factor that trains. The other one is frozen, and every client has it."""
        return "B"

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        frozen = "A" if self.factor == "B" else "B"
        return Start.of(nested(state, client.rank, client.scale, self.factor), frozen)

    def trainable(self, state: LayerState, client: Profile) -> Trainable:
        return Trainable(parts=(self.factor, "head"))

    def aggregate(self, state: LayerState, updates: Updates, advance: Advance = fedavg) -> LayerState:
        pairs, mean, part = state.pairs, HeadMean(), self.factor
        values = {name: getattr(pair, part) for name, pair in pairs.items()}
        sums = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in values.items()}
        owned = {name: torch.zeros(pair.rank, dtype=torch.float64) for name, pair in pairs.items()}
        for update in updates:
            mean.count(update.weight, update)
            for name, own in update.moved.layers.items():
                first = slice(own.rank), slice(None)  # its ranks, of a factor with the ranks in front
                change = _by_rank(getattr(own, part).double(), part)
                _by_rank(sums[name], part)[first] += update.weight * own.scale / pairs[name].scale * change
                owned[name][: own.rank] += update.weight
        head_change, layers = mean.head(), {}
        for name, pair in pairs.items():
            change = sums[name] / mean.weight
            if self.missing == "zero":
                lost = 1 - owned[name] / mean.weight
                change -= _by_rank(lost[:, None] * _by_rank(values[name].double(), part), part)
            value = advance(f"{part}.{name}", values[name], change.float())
            layers[name] = replace(pair, B=value) if part == "B" else replace(pair, A=value)
        return state.next_with_head(advance, head_change, layers=layers)


def _by_rank(factor: Tensor, part: str) -> Tensor:
    """A view of B or of A with the ranks in front; of such a view, the factor again."""
    return factor.T if part == "B" else factor
