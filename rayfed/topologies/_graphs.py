"""Graphs of clients: who is a neighbour of whom, and the weights with which neighbours average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayfed import seeding
from rayfed.errors import UserError, allowed

MOST_CLIENTS = 10_000  # each has a model of its own, in a file of its own
MOST_EDGES = 1_000_000  # directed: each of them is a message in every exchange


@dataclass(frozen=True)
class Graph:
    """An undirected, connected graph. ``neighbours`` maps the ids of all clients, ascending, to those of their
    neighbours, ascending."""

    neighbours: Mapping[int, tuple[int, ...]]

    @property
    def edges(self) -> int:
        """Directed edges: twice the number of pairs of neighbours."""
        return sum(map(len, self.neighbours.values()))

    def among(self, active: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """The neighbours that each of the ``active`` clients has among them."""
        present = set(active)
        return {client: tuple(other for other in self.neighbours[client] if other in present) for client in active}

    def spectral_gap(self) -> float:
        """1 - the second largest absolute eigenvalue of W when all clients are active: 1 averages at once, 0 never.

        Takes a dense matrix of all clients.
        """
        clients, W = list(self.neighbours), np.eye(len(self.neighbours))
        place = {client: i for i, client in enumerate(clients)}
        for client, weights in metropolis(self.neighbours).items():
            for other, weight in weights.items():
                W[place[client], place[other]] = weight
                W[place[client], place[client]] -= weight
        return 1 - float(np.sort(np.abs(np.linalg.eigvalsh(W)))[-2])


def metropolis(neighbours: Mapping[int, Sequence[int]]) -> dict[int, dict[int, float]]:
    """Metropolis weights ``W_ij = 1 / (1 + max(d_i, d_j))`` of each client's neighbours; d: numbers of neighbours.

    ``W_ii`` is what is left to 1. W is symmetric, so it is doubly stochastic on any graph, also on the part of a graph
    whose clients are active.
    """
    return {
        client: {other: 1 / (1 + max(len(others), len(neighbours[other]))) for other in others}
        for client, others in neighbours.items()
    }


def make_graph(kind: str, clients: Sequence[int], probability: float | None, seed: int) -> Graph:
    """The graph of that ``kind`` (`topology.graph`) over the ``clients``, in their order.

    ``probability`` is that of each edge of `erdos_renyi`, drawn by ``seed``. UserError where the number of clients does
    not fit, where the graph is not connected, or where it has too many edges.
    """
    n = len(clients)
    if not 2 <= n <= MOST_CLIENTS:
        raise allowed("topology.graph", kind, f"{n} clients hold data, and a graph has from 2 to {MOST_CLIENTS}")
    if kind == "ring":
        pairs = [(i, (i + 1) % n) for i in range(n)]
    elif kind == "torus":
        pairs = _torus(n)
    elif (expected := n * (n - 1) * (probability or 1.0)) > MOST_EDGES:
        what = f"{n} clients make about {expected:.0f} messages in an exchange, and at most {MOST_EDGES} are allowed"
        raise allowed("topology.graph", kind, what)
    elif kind == "complete":
        pairs = [(i, j) for i in range(n) for j in range(i)]
    else:
        assert probability is not None
        rng = seeding.numpy_rng(seed, "topology.edges")
        pairs = [(i, j) for i in range(n) for j in np.flatnonzero(rng.random(i) < probability).tolist()]
    others: list[set[int]] = [set() for _ in range(n)]
    for i, j in pairs:
        others[i].add(j)
        others[j].add(i)
    if (reached := _reached(others)) < n:
        larger = min(max(2 * np.log(n) / n, 2 * (probability or 0)), 1)
        what = (
            f"the graph that seed={seed} draws is not connected: client {clients[0]} reaches {reached} of {n} clients; "
            f"a larger one is allowed, such as {larger:.2g}, or another seed"
        )
        raise allowed("topology.edge_probability", probability, what)
    return Graph({clients[i]: tuple(clients[j] for j in sorted(own)) for i, own in enumerate(others)})


def _torus(n: int) -> list[tuple[int, int]]:
    """The edges of the most square torus of n clients: everyone has four neighbours."""
    rows = next((side for side in range(int(n**0.5), 2, -1) if n % side == 0), 0)
    if not rows:
        raise UserError(
            f"topology.graph: got 'torus', but {n} clients hold data, and a torus needs a product of two numbers of at "
            "least 3, such as 9, 12, 15 or 16"
        )
    columns = n // rows
    places = np.arange(n).reshape(rows, columns)
    return [
        (int(place), int(other))
        for axis in (0, 1)
        for place, other in zip(places.ravel(), np.roll(places, -1, axis).ravel(), strict=True)
    ]


def _reached(others: Sequence[set[int]]) -> int:
    """The number of nodes that are connected with the first one, itself included."""
    seen, waiting = {0}, [0]
    while waiting:
        new = others[waiting.pop()] - seen
        seen |= new
        waiting += new
    return len(seen)
