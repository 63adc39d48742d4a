"""What passes between the server and a method: where a client starts, what it trains, what it changed.

n is the number of entries of a client's adapter as one flat vector; its `Layout` says which entry is which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.lora.algebra import add
from rayfed.objectives.base import Objective
from rayfed.profiles.profile import Profile

BaseChange = Mapping[str, LowRank | Tensor]
"""A frozen change of the base by layer: a low-rank pair or a matrix (out, in), whichever is smaller."""

_IN_CACHE = 2**15  # entries whose float64 temporaries fit into a core's cache
_FEW = 8  # one entry at its index takes as long to add as so many of a whole vector


@dataclass(frozen=True)
class Start:
    """Where a client starts, before encoding: a flat vector (n,) with its layout, on top of a frozen base."""

    vector: Tensor
    layout: Layout
    mask: Tensor | None = None
    """Boolean (n,): the entries to send. None: the server sends the largest entries, as many as the density allows.
    With `Profile.head_whole` the server adds the head to either."""
    dense: bool = False
    """If true, all entries travel down in this round, whatever the client's density is."""
    known: Tensor | None = None
    """Boolean (n,): entries that never travel, because the client has them already. Either they are drawn from a seed,
    or they are the client's own from an earlier round."""
    merge: Adapter | None = None
    """A change of the base that travels beside the adapter, whole. The client merges it into its base before it
    trains. Its head is empty."""
    base: BaseChange = field(default_factory=dict)
    """The change of the client's base before that merge."""

    @classmethod
    def of(cls, adapter: Adapter, *known_parts: str, **more: Any) -> Start:
        """A start from this adapter, of which the client knows the ``known_parts`` ("A", "B", "head")."""
        if known_parts:
            more["known"] = adapter.layout.mask(*known_parts)
        return cls(adapter.flatten(), adapter.layout, **more)

    @property
    def merged_base(self) -> BaseChange:
        """The change of the client's base after the merge: the base on which the client trains."""
        return self.base if self.merge is None else merged(self.base, self.merge)


def merged(base: BaseChange, merge: Adapter) -> BaseChange:
    """The change of the base after the adapter's products were added: the same bits at the server and at the client."""
    products = {name: add(matrix(base[name]), pair) if name in base else pair for name, pair in merge.layers.items()}
    return {**base, **products}


@dataclass(frozen=True)
class Trainable:
    """Which entries of a client's adapter train, and how."""

    parts: tuple[str, ...] = ("A", "B", "head")
    """The parts that train."""
    received_only: bool = False
    """If true, only those entries train that the client received or knew."""
    entries: Tensor | None = None
    """Boolean (n,): of these parts only these entries train. None: all."""
    personal: tuple[str, ...] = ()
    """Parts that train and are never uploaded. They come back as `Update.personal_values`."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """By part, a factor on the client's learning rate. A part that is not named has factor 1."""
    objective: Objective | None = None
    """The client's own objective, of which the penalty is added to the run's objective. None: there is none."""

    def support(self, layout: Layout, received: Tensor | None) -> Tensor:
        """Boolean (n,): the entries that train. ``received`` (n,) marks the entries that have a value; None: all.

        Server and client compute it alike. So an upload needs no indices for entries that cannot have changed.
        """
        support = layout.mask(*self.parts)
        support = support if self.entries is None else support & self.entries
        return support & received if self.received_only and received is not None else support

    def uploaded(self, layout: Layout, support: Tensor) -> Tensor:
        """Boolean (n,): the entries of ``support`` that may be sent up."""
        return support & ~layout.mask(*self.personal) if self.personal else support

    def same_support(self, other: Trainable) -> bool:
        """True if the two functions above surely give the same answers. ``entries`` are compared by identity."""
        mine, others = ((t.parts, t.received_only, t.personal) for t in (self, other))
        return mine == others and self.entries is other.entries


@dataclass(frozen=True)
class Sparse:
    """A vector (n,) of zeros, except for ``values`` (k,), float32, at ``indices`` (k,), int64, all different."""

    n: int
    indices: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """The vector (n,), float32, as a new tensor."""
        return torch.zeros(self.n).index_copy_(0, self.indices, self.values)


@dataclass(frozen=True)
class Update:
    """What came back from one client, as the server decoded it.

    The client trained from ``start`` (n,). ``sparse_change`` (n,) is the change that it uploaded.
    ``weight`` is its aggregation weight, not yet divided by the cohort's sum. ``stats`` has loss, examples and steps.
    ``personal_values`` (n,) are its trained values in the personal parts, zeros elsewhere; None: no part is personal.
    """

    client: Profile
    weight: float
    start: Tensor
    sparse_change: Tensor | Sparse
    layout: Layout
    stats: Mapping[str, float] = field(default_factory=dict)
    personal_values: Tensor | None = None

    @cached_property
    def change(self) -> Tensor:
        """The uploaded change as a dense vector (n,), float32."""
        return self.sparse_change.dense() if isinstance(self.sparse_change, Sparse) else self.sparse_change

    def add_to(self, total: Tensor) -> None:
        """Adds ``weight * change`` to ``total`` (n,), float64, in place. It costs as much as was uploaded."""
        add_weighted(total, self.weight, self.sparse_change)

    @property
    def sent(self) -> Adapter:
        """The adapter from which the client started, as the client decoded it."""
        return self.layout.unflatten(self.start)

    @cached_property
    def moved(self) -> Adapter:
        """The uploaded change as an adapter: its pairs hold dB (out, r) and dA (r, in), its head the head's change."""
        return self.layout.unflatten(self.change)

    @property
    def trained(self) -> Adapter:
        """The client's adapter after training: what was sent plus what was uploaded."""
        return self.layout.unflatten(self.start + self.change)


Updates = Iterable[Update]
"""The updates of a cohort, one for each client in a fixed order. It can be read once."""


@dataclass(frozen=True)
class PackSum:
    """The updates of a pack as one sum, sum_k weight_k change_k (n,), and the sum of weights.

    ``total``, float64, has the sum's entries at ``indices`` (m,), int32, all different; the others are 0. If
    ``indices`` is None, it has all n.
    """

    weight: float
    total: np.ndarray
    indices: np.ndarray | None = None

    @classmethod
    def of(cls, changes: Iterable[tuple[float, Tensor | Sparse]], size: int) -> PackSum:
        """Adds up one or more (weight, change) of ``size`` entries in their order: the same bits in every process."""
        changes = iter(changes)
        first, second = next(changes), next(changes, None)
        if second is None and isinstance(one := first[1], Sparse) and len(one.indices) <= size // _FEW:
            return cls(first[0], first[0] * one.values.double().numpy(), one.indices.numpy().astype(np.int32))
        total, weights = torch.zeros(size, dtype=torch.float64), 0.0
        for weight, change in chain([first], [second] if second else [], changes):
            add_weighted(total, weight, change)
            weights += weight
        sums = total.numpy()
        indices = np.flatnonzero(sums != 0)
        if len(indices) > size // _FEW:
            return cls(weights, sums)
        return cls(weights, sums[indices], indices.astype(np.int32))

    def add_to(self, total: Tensor) -> None:
        """Adds the sum to ``total`` (n,), float64, in place."""
        # Arrays from Ray are read-only, and torch warns of those. So NumPy adds or copies them.
        if self.indices is None:
            sums = total.numpy()
            np.add(sums, self.total, out=sums)
        else:
            total.scatter_add_(0, torch.from_numpy(self.indices.astype(np.int64)), torch.from_numpy(self.total.copy()))


def add_weighted(total: Tensor, weight: float, change: Tensor | Sparse) -> None:
    """Adds ``weight * change`` to ``total`` (n,), float64, in place. Both forms of a change give the same bits."""
    if isinstance(change, Sparse):
        total.scatter_add_(0, change.indices, change.values.double().mul_(weight))
        return
    for part, values in zip(total.split(_IN_CACHE), change.split(_IN_CACHE)):
        part += weight * values.double()


def matrix(change: LowRank | Tensor) -> Tensor:
    """A layer's change as a matrix (out, in)."""
    return change.dense() if isinstance(change, LowRank) else change
