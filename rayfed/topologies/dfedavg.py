"""Decentralised FedAvg: local training, then one average with the neighbours.

    x_i <- LocalTraining(x_i)          `client.optimizer`, `client.epochs` or `client.steps`
    x_i <- sum_j W_ij x_j              one message to each neighbour

It is the baseline of algorithms on graphs. With more than one local step and clients that differ it does not reach the
optimum: each client's steps pull towards its own, and the average settles where these pulls cancel. On a complete graph
a round is FedAvg with uniform weights. No options.

Source: secondary (Sun et al., arXiv 2104.11981, Algorithm 1); deviates: any local optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rayfed.topologies.base import Algorithm, Network, Vectors


@dataclass(frozen=True)
class DFedAvg(Algorithm):
    """Local training, then averaging with the neighbours. No options."""

    objectives: ClassVar[tuple[str, ...]] = ("plain", "fedprox", "fedlc", "fedga", "tail_penalty")

    def round(self, own: Vectors, network: Network) -> Vectors:
        return {"x": network.exchange(network.train(own["x"]))}
