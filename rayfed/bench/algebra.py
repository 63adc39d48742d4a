"""The low-rank kernel: factored against dense SVD, and FedHL's calibration with and without the full SVD."""

from __future__ import annotations

import torch

from rayfed.bench.timing import Row, paired
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.lora.algebra import factors, stack, svd, top_svd
from rayfed.methods._truncation import decomposed
from rayfed.methods.base import Profile, Update
from rayfed.methods.fedhl import FedHL


def measure(size: int = 4096, layers: int = 24, width: int = 768) -> list[Row]:
    """Three comparisons; the dense SVD of the first takes a quarter of a minute at the default size."""
    return [factored_svd(size), truncation(width), calibration(layers, width)]


def factored_svd(size: int, clients: int = 16, rank: int = 16) -> Row:
    """The mean of the clients' products: exact SVD of the stack against the SVD of the matrix."""
    g = torch.Generator().manual_seed(0)
    pairs = [
        LowRank(torch.randn(size, rank, generator=g), torch.randn(rank, size, generator=g), 1.0) for _ in range(clients)
    ]
    weights = [1 / clients] * clients
    stacked = stack(pairs, weights)
    dense = stacked.dense()
    found = svd(stacked)
    error = float((factors(found, found.rank, 1.0).dense() - dense).norm() / dense.norm())
    ours = (f"factored SVD, {size} x {size}, {clients} clients of rank {rank}", lambda: svd(stack(pairs, weights)))
    return paired("mean of products", ours, ("dense SVD", lambda: torch.linalg.svd(dense)), 1, {"error": error})


def truncation(width: int, rank: int = 32) -> Row:
    """The leading singular triples of a full-rank matrix: FedHL's two passes against the full SVD."""
    W = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    exact, quick = svd(W, rank), top_svd(W, rank, iterations=2)
    best = float(W.square().sum() - exact.S.square().sum())
    excess = (best + float(exact.S.square().sum() - quick.S.square().sum())) ** 0.5 / best**0.5 - 1
    ours = (f"{width} x {width}, rank {rank}, 2 passes", lambda: top_svd(W, rank, iterations=2))
    return paired("truncation", ours, ("full SVD", lambda: svd(W, rank)), 5, {"excess error, flat spectrum": excess})


def calibration(layers: int, width: int, clients: int = 8, rank: int = 32) -> Row:
    """One FedHL aggregation with the truncation that follows, against the full SVD of every layer alone."""
    g = torch.Generator().manual_seed(0)
    fresh = Adapter(
        {f"layer{i:02}": LowRank(torch.zeros(width, rank), torch.randn(rank, width, generator=g), 1.0)
         for i in range(layers)},
        {},
    )  # fmt: skip
    method = FedHL()
    state = method.init(fresh, 0)
    state = decomposed(state, {name: 0.01 * torch.randn(width, width, generator=g) for name in state.layers})
    updates = []
    for k in range(clients):
        client = Profile(k, max(rank >> (k % 4), 1), 1.0)
        start = method.broadcast(state, client)
        change = 0.01 * torch.randn(start.vector.shape, generator=g)
        updates.append(Update(client, 1.0, start.vector, change, start.layout))
    ours = (f"{layers} layers of {width} x {width}, {clients} clients", lambda: method.aggregate(state, updates))
    full = ("full SVD of every layer", lambda: [torch.linalg.svd(W) for W in state.layers.values()])
    return paired("FedHL's calibration", ours, full, 3)
