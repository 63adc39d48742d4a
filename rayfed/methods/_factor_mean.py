"""Averaging factors: what FedIT, FLASC and their relatives share.

The state is the global adapter as one dense flat vector P (n,). Clients upload changes, the server averages them,

    P <- advance(P, sum_k p_k (P_k - P))

which with the plain server step is the mean of the factors, ``sum_k p_k P_k``, and lets any server optimizer act on
it. All clients have one rank: entry i means the same for everybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.methods.base import Advance, Defaults, Profile, Start, Update, fedavg, mean_change


@dataclass(frozen=True)
class FactorState:
    """P (n,), the rounds that made it, and whatever further vectors (n,) a method keeps."""

    vector: Tensor
    layout: Layout
    rounds: int = 0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    clients: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector, **self.extras}

    def facts(self) -> dict[str, Any]:
        return {"layout": self.layout.to_json(), "rounds": self.rounds, "report": dict(self.report)}


class FactorMean(Defaults):
    """The mean of factors; subclasses say what is sent and what trains."""

    optimizers: ClassVar[tuple[str, ...]] = ("fedavg", "sgd", "fedavgm", "fedadam", "adamw")

    def init(self, adapter: Adapter, seed: int) -> FactorState:
        return FactorState(adapter.flatten(), adapter.layout)

    def restore(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], clients: Mapping[int, Mapping[str, Tensor]]
    ) -> FactorState:
        extras = {name: tensor for name, tensor in tensors.items() if name != "vector"}
        layout = Layout.from_json(facts["layout"])
        return FactorState(tensors["vector"], layout, int(facts["rounds"]), extras, clients, facts["report"])

    def broadcast(self, state: FactorState, client: Profile) -> Start:
        return Start(state.vector, state.layout)

    def aggregate(self, state: FactorState, updates: Iterable[Update], advance: Advance = fedavg) -> FactorState:
        change = mean_change(updates, state.layout.size)
        return replace(state, vector=advance("vector", state.vector, change), rounds=state.rounds + 1)

    def delta(self, state: FactorState, layer: str) -> LowRank:
        return state.layout.unflatten(state.vector).layers[layer]

    def head(self, state: FactorState) -> Mapping[str, Tensor]:
        return state.layout.unflatten(state.vector).head

    def layers(self, state: FactorState) -> tuple[str, ...]:
        return tuple(state.layout.scales)
