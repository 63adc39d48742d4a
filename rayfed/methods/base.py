"""What a federated LoRA method is: state in, state out.

A method decides what is sent to each client, which entries train, and how uploads become the next global state. It
knows adapters and client profiles; no Ray, no models, no files. What travels is decided around it:

1. `broadcast` says where a client starts: its adapter, and the frozen change of the base beneath it. Entries of the
   adapter that the client has already (``known``) do not travel; of the others the wire sends the largest, or those of
   ``mask``. The client trains what it decoded.
2. `select` picks, at the client, which of its changes go up; `trainable` says what trains and what stays personal.
3. `aggregate` gets start and change of every client as decoded, pack after pack. A `sum_in_worker` method asks for no more
   than the sum of the weighted changes; the server hands it `PackSum` packs, which may come from where they were
   trained. The server optimizer is an axis of its own, handed over as ``advance``.
4. `news` is what every client must merge into its base after a round; the server counts it for each client that takes
   part, together with the news of the rounds it missed (or the whole change of the base where that is smaller).

The state holds global tensors, and under ``clients`` what belongs to single clients and survives between rounds. Both
are checkpointed; neither is traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.objectives.base import Objective
from rayfed.profiles.profile import Profile
from rayfed.wire import top_k

BaseChange = Mapping[str, LowRank | Tensor]
"""A frozen change of the base: by layer a low-rank pair or a matrix (out, in), whichever is cheaper."""

Advance = Callable[[str, Tensor, Tensor], Tensor]
"""One server-optimizer step: (name of the tensor, its value, its mean change) -> its next value, all of one shape."""

_IN_CACHE = 2**15  # entries whose float64 temporaries stay in a core's cache


@dataclass(frozen=True)
class Start:
    """Where a client starts, before the wire: a flat vector (n,) with its layout, over a frozen change of the base.

    ``mask`` (n,) names the entries to send; None leaves the choice to the wire (the largest by magnitude). With
    ``dense`` everything travels this round, both ways, whatever the client's densities. ``known`` (n,) marks entries
    that never travel, since the client has them: drawn from a seed it knows, or its own from an earlier round.
    ``extra`` (m,) travels beside the adapter, whole. ``base`` is the change of the base that the client has by then.
    """

    vector: Tensor
    layout: Layout
    mask: Tensor | None = None
    dense: bool = False
    known: Tensor | None = None
    merge: Adapter | None = None
    base: BaseChange = field(default_factory=dict)


@dataclass(frozen=True)
class Trainable:
    """Which entries train: whole parts, or of these only ``entries`` (n,), or only what the client has a value for."""

    parts: tuple[str, ...] = ("A", "B", "head")
    received_only: bool = False  # only entries that arrived in the payload, or were held
    entries: Tensor | None = None
    personal: tuple[
        str, ...
    ] = ()  # parts that train and are never uploaded: they come back as `Update.personal_values`
    rates: Mapping[str, float] = field(default_factory=dict)  # part -> factor on the client's learning rate
    objective: Objective | None = None  # the client's own; None: the run's

    def whole(self, layout: Layout) -> Tensor:
        """Boolean (n,): the entries that could train, had everything arrived."""
        whole = layout.mask(*self.parts)
        return whole if self.entries is None else whole & self.entries

    def support(self, layout: Layout, received: Tensor | None) -> Tensor:
        """Boolean (n,): the entries that train. ``received`` (n,): which the client has a value for; None: all.

        Server and client compute it alike, so an upload needs no indices for entries that cannot have changed.
        """
        whole = self.whole(layout)
        return whole & received if self.received_only and received is not None else whole

    def uploaded(self, layout: Layout, support: Tensor) -> Tensor:
        """Boolean (n,): the entries of ``support`` that may be sent up."""
        return support & ~layout.mask(*self.personal) if self.personal else support

    def same_support(self, other: Trainable) -> bool:
        """Do the three above surely answer the same? Given ``entries`` are compared by identity."""
        mine, others = ((t.parts, t.received_only, t.personal) for t in (self, other))
        return mine == others and self.entries is other.entries


@dataclass(frozen=True)
class Sparse:
    """A vector (n,) of zeros, but for ``values`` (k,), float32, at ``indices`` (k,), int64, all different."""

    n: int
    indices: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """The vector (n,), float32; a fresh tensor."""
        return torch.zeros(self.n).index_copy_(0, self.indices, self.values)


@dataclass(frozen=True)
class Update:
    """What came back from one client, as decoded: ``start`` (n,) it trained from, and how it ``sparse_change`` (n,).

    A method reads ``change``, or adds the change to a sum by ``add_to``, which costs as much as was sent.
    ``personal_values`` (n,): its trained values in the personal parts, zeros elsewhere; None where nothing is personal.
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
        """The change it made (n,), float32."""
        return self.sparse_change.dense() if isinstance(self.sparse_change, Sparse) else self.sparse_change

    def add_to(self, total: Tensor) -> None:
        """Adds ``weight * change`` to ``total`` (n,), float64, in place; the same bits in either form of ``sparse_change``."""
        add_weighted(total, self.weight, self.sparse_change)

    @property
    def trained(self) -> Adapter:
        """The client's adapter after training, as far as it was uploaded."""
        return self.layout.unflatten(self.start + self.change)

    @property
    def sent(self) -> Adapter:
        """The adapter the client started from, as it decoded it."""
        return self.layout.unflatten(self.start)


@dataclass(frozen=True)
class PackSum:
    """The updates of a pack as one addend: ``total`` (n,) = sum_k weight_k change_k, float64; and all weight."""

    weight: float
    total: np.ndarray

    @classmethod
    def of(cls, changes: Iterable[tuple[float, Tensor | Sparse]], size: int) -> PackSum:
        """Adds weighted changes of ``size`` entries, in their order; the same bits wherever it is done."""
        total, weights = torch.zeros(size, dtype=torch.float64), 0.0
        for weight, moved in changes:
            add_weighted(total, weight, moved)
            weights += weight
        return cls(weights, total.numpy())

    def add_to(self, total: Tensor) -> None:
        """Adds the sum to ``total`` (n,), float64, in place."""
        sums = total.numpy()
        np.add(sums, self.total, out=sums)  # in NumPy: what comes through Ray may only be read, which torch warns of


class State(Protocol):
    """A method's global state: tensors that safetensors can store, plus plain JSON values."""

    @property
    def clients(self) -> Mapping[int, Mapping[str, Tensor]]:
        """What single clients keep between rounds, by client id."""

    @property
    def report(self) -> Mapping[str, float]:
        """Figures about the last aggregation, for the metrics (`method/...`)."""

    def tensors(self) -> dict[str, Tensor]: ...

    def facts(self) -> dict[str, Any]: ...


class Method(Protocol):
    """One federated LoRA method; see the module docstring, and `flasc.py` for one. `Defaults` has the usual answers."""

    weights: str  # "uniform" or "examples": the paper's aggregation weights
    optimizer: str  # the paper's server optimizer
    optimizers: tuple[str, ...]  # server optimizers that make sense with it
    mixed_ranks: bool  # may clients have different ranks?
    sparse_down: bool  # may downloads be sparse or rounded?
    sparse_up: bool  # may uploads be?
    personal: bool  # does every client get a payload of its own, rather than every tier?
    sum_in_worker: (
        bool  # does `aggregate` need only the sum of the weighted changes? Then it takes `PackSum` packs as well
    )

    def init(self, adapter: Adapter, seed: int) -> Any:
        """The state before round 0. ``adapter``: fresh (B = 0, A random), of the largest rank, with its scale."""

    def restore(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], clients: Mapping[int, Mapping[str, Tensor]]
    ) -> Any:
        """The state that gave these `tensors()`, `facts()` and `clients`."""

    def broadcast(self, state: Any, client: Profile) -> Start: ...

    def trainable(self, state: Any, client: Profile) -> Trainable: ...

    def select(self, start: Tensor, change: Tensor, layout: Layout, budget: int, density: float) -> Tensor:
        """At the client: which entries to upload, as sorted indices into (n,).

        ``change`` (n,) is zero where nothing trained or nothing may be sent; at most ``budget`` indices.
        """

    def aggregate(self, state: Any, updates: Iterable[Any], advance: Advance = ...) -> Any:
        """The next state. ``updates``: `Update`s; where the method is ``sum_in_worker``, these, `PackSum` packs, or both."""

    def base_update(self, state: Any) -> Tensor | None:
        """What every client must receive of the last round to merge it into its base, (m,); None: nothing."""

    def delta(self, state: Any, layer: str) -> LowRank | Tensor:
        """The global model's whole change of a layer (the base's included): what is evaluated and exported."""

    def head(self, state: Any) -> Mapping[str, Tensor]: ...

    def layers(self, state: Any) -> tuple[str, ...]: ...


class Defaults:
    """What most methods answer."""

    weights = "examples"
    optimizer = "fedavg"
    optimizers: ClassVar[tuple[str, ...]] = ("fedavg",)
    mixed_ranks = False
    sparse_down = True
    sparse_up = True
    personal = False
    sum_in_worker = False  # also where the sum would do, but is mostly zeros: Fed-SB's cores, S-LoRA's sparse stage

    def trainable(self, state: Any, client: Profile) -> Trainable:
        return Trainable()

    def select(self, start: Tensor, change: Tensor, layout: Layout, budget: int, density: float) -> Tensor:
        return top_k(change, budget)

    def base_update(self, state: Any) -> Tensor | None:
        return None


def fedavg(name: str, value: Tensor, change: Tensor) -> Tensor:
    """The plainest server step: add the mean change."""
    return value + change


def add_weighted(total: Tensor, weight: float, moved: Tensor | Sparse) -> None:
    """Adds ``weight * moved`` to ``total`` (n,), float64, in place; the same bits in either form."""
    if isinstance(moved, Sparse):
        total.scatter_add_(0, moved.indices, moved.values.double().mul_(weight))
        return
    for part, values in zip(total.split(_IN_CACHE), moved.split(_IN_CACHE)):
        part += weight * values.double()


def mean_change(updates: Iterable[Update | PackSum], size: int) -> Tensor:
    """``sum_k p_k change_k`` as float32 (n,); p_k are the weights scaled to sum 1. Consumes updates one at a time.

    Sums in float64, in the order given: memory stays at one vector whatever the cohort, and rounding of the sum is
    below that of its terms.
    """
    total, weight = torch.zeros(size, dtype=torch.float64), 0.0
    for update in updates:
        update.add_to(total)
        weight += update.weight
    if weight <= 0:
        raise ValueError("no update with a positive weight to aggregate")
    return (total / weight).float()
