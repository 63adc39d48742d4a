"""The base class of algorithms on a graph, and the network as an algorithm sees it.

K is the number of clients that are active in a round, m the number of entries that train and travel. All vectors of the
active clients are the rows of matrices (K, m), so an algorithm reads like its equations. It is a function of tensors
alone: the path of a run gives it float32, tests give it float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from rayfed.config.training import Client

Vectors = Mapping[str, Tensor]
"""The vectors of the active clients by name, (K, m) each."""


class Network(Protocol):
    """The active clients of one round. Row i of a matrix belongs to the same client throughout the round."""

    settings: Client
    """The section `client`."""
    lr: float
    """The learning rate of the round."""
    columns: Tensor
    """(m,) int64: the column of B (of the core R, where one trains) to which an entry belongs, numbered from 0 over all
    layers. -1 for entries of A and of the head."""

    def exchange(self, values: Tensor) -> Tensor:
        """``W values`` (K, m): every client sends its row to its active neighbours and averages what arrives.

        W (K, K) is symmetric and doubly stochastic, so the mean of the rows stays.
        """

    def gradients(self, x: Tensor, step: int) -> Tensor:
        """Each client's stochastic gradient (K, m) at its row of ``x``, on its batch of local step ``step``."""

    def train(self, x: Tensor) -> Tensor:
        """Each row after the client's local training, by `client.optimizer`."""


class Algorithm:
    """What the clients of a graph compute. A subclass is a frozen dataclass of its options."""

    vectors: ClassVar[tuple[str, ...]] = ("x",)
    """The vectors that every client stores between rounds. `x` is its model, at first the common start; others start
    at 0."""
    exchanges: ClassVar[int] = 1
    """How often a round calls `Network.exchange`: messages on each edge."""
    objectives: ClassVar[tuple[str, ...]] = ("plain",)
    """The objectives that make sense with the algorithm."""

    def check(self, name: str, client: Client) -> None:
        """UserError where the section ``client`` does not fit the algorithm of that name."""

    def round(self, own: Vectors, network: Network) -> Vectors:
        """The clients' vectors after one round, from those before it. Must not change ``own``."""
        raise NotImplementedError
