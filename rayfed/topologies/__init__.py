"""Topologies without a server: clients are the nodes of a graph and exchange messages with their neighbours alone.

One file per algorithm; `topology.algorithm` names it. `rayfed.server.gossip` runs its rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayfed.config.options import make_member
from rayfed.plugins import member_class, member_names
from rayfed.topologies._graphs import Graph, make_graph, metropolis
from rayfed.topologies._own_models import OwnModels, columns_of
from rayfed.topologies.base import Algorithm, Network, Vectors

ALGORITHMS = member_names("rayfed.topologies")


@dataclass(frozen=True)
class Gossip:
    """The topology of a run without a server: who is a neighbour of whom, and what the clients compute."""

    graph: Graph
    algorithm: Algorithm


def build(name: str, **options: Any) -> Algorithm:
    """The algorithm of that name, or at the import path `package.module:Class`, with these options.

    UserError for an unknown name or option, for a value that the option does not allow, and for an option that is
    missing.
    """
    found = member_class("rayfed.topologies", name, Algorithm, "topology.algorithm")
    return make_member(found, "topology", name, options)


__all__ = [
    "ALGORITHMS", "Algorithm", "Gossip", "Graph", "Network", "OwnModels", "Vectors", "build", "columns_of",
    "make_graph", "metropolis",
]  # fmt: skip
