"""RoLoRA (Chen et al., arXiv 2502.01755): train one factor at a time, so that averaging is exact.

Rounds count from 0. A and B are the factors of the whole model, s the scale, p_k ~ n_k the aggregation weights:

    even rounds    B <- sum_k p_k B_k,   A frozen and shared      sum_k p_k s B_k A = s B A
    odd rounds     A <- sum_k p_k A_k,   B frozen and shared      sum_k p_k s B A_k = s B A

The head is averaged in every round. The mean of the factors is the mean of the products, since the other factor is the
same for all clients; nothing is lost that FedIT loses. B goes first: it starts at 0, and with B = 0 A gets no gradient.

Up travels the factor that trained, r out or r in entries a layer. Down travel both by default, since a client may have
missed any round. A client that took part in the last round lacks only what that round changed (`down`). Downloads
are dense: a frozen factor that is cut differently for different clients is not shared, and the sum above not exact.
Uploads may be sparse. Any server optimizer may take the step. Each part has its own moments; a factor's value and
moments do not change in the rounds in which it is frozen.

Source: secondary; deviates: nothing known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from rayfed.methods import Advance, FactorMean, FactorState, Profile, Start, Trainable, Updates, fedavg, mean_change


@dataclass(frozen=True)
class RoLoRA(FactorMean):
    """Alternate: B in even rounds, A in odd ones."""

    down: Literal["all", "changed"] = "all"
    """What travels down after round 0. `all`: both factors, which is right for any cohort. `changed`: the factor that
    the last round changed, as papers count it; that assumes that every client took part in the last round."""

    paper = "arXiv 2502.01755"
    summary = "alternate: B in one round, A in the next"
    traffic_up: ClassVar[str] = "r out or r in"
    source = "secondary"
    sparse_down = False
    sum_in_worker: ClassVar[bool] = True
    secure_aggregation = True
    summed = "changes"

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        start = super().broadcast(state, client)
        if self.down == "all" or state.rounds == 0:
            return start
        # The last round trained the other factor. The client has the factor that trains now.
        return replace(start, known=state.layout.mask(trained_factor(state)))

    def trainable(self, state: FactorState, client: Profile) -> Trainable:
        return Trainable(parts=(trained_factor(state), "head"))

    def aggregate(self, state: FactorState, updates: Updates, advance: Advance = fedavg) -> FactorState:
        return self.step(state, mean_change(updates, state.layout.size), advance)

    def step(self, state: FactorState, change: Tensor, advance: Advance) -> FactorState:
        """The next state after this mean change (n,): a step of the factor that trained, and one of the head."""
        vector = state.vector.clone()
        for part in (trained_factor(state), "head"):
            entries = state.layout.mask(part)
            if bool(entries.any()):
                vector[entries] = advance(part, vector[entries], change[entries])
        return state.next(vector=vector)


def trained_factor(state: FactorState) -> str:
    """The factor that trains in the round that starts from this state: "B", then "A", and so on."""
    return "B" if state.rounds % 2 == 0 else "A"
