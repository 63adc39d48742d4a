"""A method on a graph: every client has a model of its own, and the global model is the mean of all of them.

The method says what the model consists of, which entries train, and how an adapter is evaluated and exported. Its
aggregation gets one update, the mean of the clients' models: that is exact where the mean of entries is the mean of
models (`Method.mixing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.methods import Advance, Method, Profile, Start, Trainable, Update, fedavg


class OwnModels(Method):
    """``method`` for ``clients`` that all have the adapter of ``profile`` and store ``vectors`` (m,) between rounds.

    m is the number of entries that train. `State.clients` has the vectors of every client from the start on.
    """

    personal = True

    def __init__(self, method: Method, profile: Profile, clients: Sequence[int], vectors: Sequence[str]) -> None:
        self.method, self.profile, self.clients, self.vectors = method, profile, tuple(clients), tuple(vectors)

    def init(self, adapter: Adapter, seed: int) -> Any:
        state = self.method.init(adapter, seed)
        start, trains = self.common(state)
        x = start.vector[trains]
        own = {name: x if name == "x" else torch.zeros_like(x) for name in self.vectors}
        return replace(state, clients=dict.fromkeys(self.clients, own))

    def restore(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], clients: Mapping[int, Mapping[str, Tensor]]
    ) -> Any:
        return self.method.restore(tensors, facts, clients)

    def broadcast(self, state: Any, client: Profile) -> Start:
        start, trains = self.common(state)
        return replace(start, vector=start.vector.masked_scatter(trains, state.clients[client.client]["x"]))

    def trainable(self, state: Any, client: Profile) -> Trainable:
        return self.method.trainable(state, self.profile)

    def aggregate(self, state: Any, updates: Iterable[Any], advance: Advance = fedavg) -> Any:
        return self.method.aggregate(state, updates, advance)

    def delta(self, state: Any, layer: str) -> LowRank | Tensor:
        return self.method.delta(state, layer)

    def head(self, state: Any) -> Mapping[str, Tensor]:
        return self.method.head(state)

    def layers(self, state: Any) -> tuple[str, ...]:
        return self.method.layers(state)

    def common(self, state: Any) -> tuple[Start, Tensor]:
        """The global model as the start of a client, and the entries (n,) of it that train, boolean."""
        start = self.method.broadcast(state, self.profile)
        return start, self.method.trainable(state, self.profile).support(start.layout, None)

    def mean_state(self, state: Any, clients: Mapping[int, Mapping[str, Tensor]]) -> tuple[Any, float | None]:
        """The state after a round at whose end the clients have these vectors, and their consensus error.

        The error is ``mean_i ||x_i - x||^2 / ||x||^2``, where x (m,) is the mean over all clients of the graph; None if
        x is 0. Sums are in float64, in the order of the clients.
        """
        start, trains = self.common(state)
        mean = torch.zeros(int(trains.sum()), dtype=torch.float64)
        for client in self.clients:
            mean += clients[client]["x"]
        mean /= len(self.clients)
        spread = sum(float((clients[client]["x"] - mean).square().sum()) for client in self.clients)
        size = float(mean.square().sum()) * len(self.clients)
        change = torch.zeros_like(start.vector)
        change[trains] = (mean - start.vector[trains]).float()
        update = Update(self.profile, 1.0, start.vector, change, start.layout)
        state = self.aggregate(state, iter([update]))
        return replace(state, clients=clients), spread / size if size else None


def columns_of(layout: Layout) -> Tensor:
    """The column of B (of the core R, where a layer has one) of each entry (n,), numbered from 0 over all layers.

    -1 for all other entries.
    """
    columns, first = torch.full((layout.size,), -1), 0
    cores = {entry.name for entry in layout.entries if entry.part == "R"}
    for entry in layout.entries:
        if entry.part == ("R" if entry.name in cores else "B"):
            rows, width = entry.shape
            columns[entry.start : entry.start + entry.numel] = torch.arange(first, first + width).repeat(rows)
            first += width
    return columns
