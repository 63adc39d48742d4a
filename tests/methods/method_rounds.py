"""One round of any method without an engine: what arrives, what trains and what goes up, in plain loops.

`play(method, state, clients, train)` does what server, wire and clients do between two states, on vectors: the start is
cut to its largest entries where a client's density asks for it, `train(client, start, adapter)` returns the trained
adapter, the upload is what `select` picks. Tests hand it changes they know and compare states with their own oracles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods.base import Profile, Start, Update, fedavg


def decoded(start: Start, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the client has to start from, which entries it has a value for): held entries are always there."""
    n = start.layout.size
    held = start.known if start.known is not None else torch.zeros(n, dtype=torch.bool)
    travels = (~held).nonzero().squeeze(1)
    if start.dense or (start.mask is None and density == 1):
        chosen = travels
    elif start.mask is not None:
        chosen = (start.mask & ~held).nonzero().squeeze(1)
    else:
        order = start.vector[travels].abs().argsort(descending=True, stable=True)
        chosen = travels[order[: int(density * len(travels))]]
    has = held.clone()
    has[chosen] = True
    return torch.where(has, start.vector, 0.0), has


def play(
    method, state, clients: Sequence[Profile], train: Callable[[Profile, Start, Adapter], Adapter] | None = None, *,
    weights: Sequence[float] | None = None, advance=fedavg,
):  # fmt: skip
    """The next state, and the updates that led to it. ``train`` None: nobody changes anything."""
    updates = []
    for k, client in enumerate(clients):
        start = method.broadcast(state, client)
        vector, has = decoded(start, client.density_down)
        trainable = method.trainable(state, client)
        support = trainable.support(start.layout, has)
        trained = vector
        if train is not None:
            wanted = train(client, start, start.layout.unflatten(vector)).flatten()
            trained = torch.where(support, wanted, vector)
        up = trainable.uploaded(start.layout, support)
        change = torch.where(up, trained - vector, 0.0)
        density = client.density_up
        budget = int(density * int(trainable.uploaded(start.layout, trainable.support(start.layout, None)).sum()))
        if density < 1:
            chosen = method.select(vector, change, start.layout, budget, density)
            assert len(chosen) <= budget
            kept_change = torch.zeros_like(change)
            kept_change[chosen] = change[chosen]
            change = kept_change
        kept = torch.where(support & ~up, trained, 0.0) if trainable.personal else None
        weight = float(client.examples) if weights is None else weights[k]
        updates.append(Update(client, weight, vector, change, start.layout, {}, kept))
    return method.aggregate(state, iter(updates), advance), updates


def random_adapter(
    shapes: dict[str, tuple[int, int]],
    rank: int,
    scale: float,
    seed: int,
    heads: dict[str, tuple[int, ...]] | None = None,
) -> Adapter:
    """Random factors (B non-zero) and head, float32."""
    rng = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(torch.randn(out, rank, generator=rng), torch.randn(rank, inner, generator=rng), scale)
        for name, (out, inner) in shapes.items()
    }
    head = {name: torch.randn(shape, generator=rng) for name, shape in (heads or {"head.weight": (3, 5)}).items()}
    return Adapter(layers, head)
