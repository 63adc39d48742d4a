"""Methods that work layer by layer: what all methods with a `LayerState` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import add
from rayfed.methods._state import Change, LayerState
from rayfed.methods.base import Method, Profile, Start


class LayerMethod(Method):
    """A method whose state holds pairs or matrices by layer, a head, and perhaps a change of the base.

    A method that merges something into the base stores its last base update as the extra "news".
    """

    state_class = LayerState

    def init(self, adapter: Adapter, seed: int) -> Any:
        return LayerState(layers=dict(adapter.layers), head=dict(adapter.head))

    def broadcast(self, state: LayerState, client: Profile) -> Start:
        return Start.of(Adapter(state.pairs, state.head), base=state.base)

    def base_update(self, state: LayerState) -> Tensor | None:
        return state.extras.get("news")

    def delta(self, state: LayerState, layer: str) -> LowRank | Tensor:
        change: Change | None = state.layers.get(layer)
        if change is None:
            return state.base[layer]
        if isinstance(change, LowRank):
            change = change.folded()
            return add(state.base[layer], change) if layer in state.base else change
        return change

    def head(self, state: LayerState) -> Mapping[str, Tensor]:
        return state.head

    def layers(self, state: LayerState) -> tuple[str, ...]:
        return tuple(sorted(state.layers or state.base))


def zero_base(adapter: Adapter) -> dict[str, Tensor]:
    """A change of the base by layer that changes nothing: matrices (out, in) of zeros."""
    return {name: torch.zeros(pair.B.shape[0], pair.A.shape[1]) for name, pair in adapter.layers.items()}


def first_ranks(pair: LowRank, rank: int, scale: float) -> LowRank:
    """The pair cut to its first ``rank`` ranks, under another scale. Views. ValueError if it has fewer ranks."""
    if rank > pair.rank:
        raise ValueError(f"a pair of rank {pair.rank} has no first {rank} ranks")
    return LowRank(pair.B[:, :rank], pair.A[:rank], scale)
