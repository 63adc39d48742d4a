"""The section that says who exchanges messages with whom: topology."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from rayfed.config.describe import mistake
from rayfed.config.types import Section, Text


class Topology(Section):
    """Who exchanges messages with whom. docs/topologies.md has the equations."""

    model_config = ConfigDict(extra="allow")
    kind: Literal["star", "graph"] = "star"
    """`star`: all clients with a server. `graph`: there is no server; the clients are the nodes of a graph, each has a
    model of its own, and neighbours exchange messages. `server.cohort` clients are active in a round.
    """
    graph: Literal["ring", "torus", "erdos_renyi", "complete"] = "ring"
    """The graph over all clients that hold data, the same in every round. `ring`: two neighbours each; `torus`: four;
    `erdos_renyi`: each edge is there with `edge_probability`, drawn by `seed`; `complete`: everyone with everyone.
    """
    edge_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """For `erdos_renyi`, which needs it. A graph that is not connected is refused."""
    algorithm: Text = "dfedavg"
    """What the clients compute. `dfedavg`: local training, then averaging with the neighbours; `depositum`: gradient
    tracking; or your own, `package.module:Class`. All other keys are options of the algorithm.
    """

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def mistakes(self) -> Iterator[str]:
        if self.kind == "star":
            given = {name: getattr(self, name) for name in ("graph", "edge_probability", "algorithm")}
            changed = {name: own for name, own in given.items() if own != Topology.model_fields[name].default}
            for name, value in (changed | self.options).items():
                yield mistake(f"topology.{name}", value, "that belongs to topology.kind=graph, and the kind is star")
        if (self.graph == "erdos_renyi") != (self.edge_probability is not None):
            what = "needs a number above 0" if self.edge_probability is None else "belongs to erdos_renyi alone"
            graph = f"topology.graph={self.graph}, and the probability {what}"
            yield mistake("topology.edge_probability", self.edge_probability, graph)
