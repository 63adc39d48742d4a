"""RoLoRA (Chen et al., arXiv 2502.01755): train one factor at a time, so that averaging is exact.

Rounds count from 0. With A and B of the whole model, s the scale and p_k ~ n_k the aggregation weights,

    even rounds    B <- sum_k p_k B_k,   A frozen and shared      sum_k p_k s B_k A = s B A
    odd rounds     A <- sum_k p_k A_k,   B frozen and shared      sum_k p_k s B A_k = s B A

and the head is averaged in every round. The mean of the factors is the mean of the products, since the other factor is
the same for all: nothing that FedIT loses. B goes first: it starts at 0, and A gets no gradient beneath a B of 0.

Up travels the factor that trained, r out or r in entries a layer. Down travel both by default, for a client may have
missed any round; a client that took part in the last one lacks only what that changed (`down`). Downloads are whole: a
frozen factor that is cut differently for different clients is no longer shared, and the sum above no longer exact.
Uploads may be sparse.

The equations are collected facts about the paper, not its text. Any server optimizer may take the step: each part has
its own moments, and a factor's value and moments rest in the rounds in which it is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from rayfed.methods._factor_mean import FactorMean, FactorState
from rayfed.methods.base import Advance, Profile, Start, Trainable, Update, fedavg, mean_change


@dataclass(frozen=True)
class RoLoRA(FactorMean):
    """Alternate: B in even rounds, A in odd ones."""

    down: Literal["all", "changed"] = "all"
    """What travels down after round 0: both factors, or the one the last round changed, as papers count it. `changed`
    takes for granted that every client took part in the last round. Default: the count that is true for any cohort."""

    sparse_down = False
    sum_in_worker = True

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        start = super().broadcast(state, client)
        if self.down == "all" or state.rounds == 0:
            return start
        # The last round trained the other factor: the one that trains now is as the client knows it.
        return replace(start, known=state.layout.mask(trained_factor(state)))

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(parts=(trained_factor(state), "head"))

    def aggregate(self, state: FactorState, updates: Iterable[Update], advance: Advance = fedavg) -> FactorState:
        change = mean_change(updates, state.layout.size)
        vector = state.vector.clone()
        for part in (trained_factor(state), "head"):
            entries = state.layout.mask(part)
            if bool(entries.any()):
                vector[entries] = advance(part, vector[entries], change[entries])
        return replace(state, vector=vector, rounds=state.rounds + 1)


def trained_factor(state: FactorState) -> str:
    """The factor that trains in the round that starts from this state: "B", then "A", and so on."""
    return "B" if state.rounds % 2 == 0 else "A"
