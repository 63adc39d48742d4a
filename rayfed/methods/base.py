"""What a federated LoRA method is: state in, state out.

A method decides what is sent to each client, which entries train, and how uploads become the next global state. It
knows adapters and client profiles; no Ray, no models, no files. What travels is decided around it: the server
sparsifies and encodes what `broadcast` returns, the client trains what it decoded and uploads its change, and
`aggregate` gets both as decoded. The server optimizer is an axis of its own, handed to `aggregate` as ``advance``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.wire import Payload

Advance = Callable[[str, Tensor, Tensor], Tensor]
"""One server-optimizer step: (name of the tensor, its value, its mean change) -> its next value, all of one shape."""


@dataclass(frozen=True)
class Profile:
    """One client in one round: who it is and what its device and link allow."""

    client: int
    rank: int
    density_down: float = 1.0  # share of entries it receives this round, in (0, 1]
    density_up: float = 1.0  # share of entries it sends this round, in (0, 1]
    examples: int = 1  # training rows it holds

    @property
    def tier(self) -> tuple[int, float]:
        """Clients of one tier receive the same payload."""
        return self.rank, self.density_down


@dataclass(frozen=True)
class Start:
    """The adapter a client starts from, before the wire: a flat vector (n,) and its layout.

    ``mask`` (n,) names the entries to send; None leaves the choice to the wire (the largest by magnitude). With
    ``dense`` everything travels this round, both ways, whatever the client's densities.
    """

    vector: Tensor
    layout: Layout
    mask: Tensor | None = None
    dense: bool = False


@dataclass(frozen=True)
class Trainable:
    """Which entries train: whole parts, and where ``received_only`` only entries that arrived in the payload."""

    parts: tuple[str, ...] = ("A", "B", "head")
    received_only: bool = False

    def support(self, layout: Layout, received: Tensor | None) -> Tensor:
        """Boolean (n,): the entries that train. ``received`` (n,): which arrived; None: all did.

        Server and client compute it alike, so an upload needs no indices for entries that cannot have changed.
        """
        support = layout.mask(*self.parts)
        return support & received if self.received_only and received is not None else support


@dataclass(frozen=True)
class Update:
    """What came back from one client, as decoded: ``start`` it trained from, ``change`` it made, both (n,)."""

    client: Profile
    weight: float
    start: Tensor
    change: Tensor
    layout: Layout
    stats: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> Adapter:
        """The client's adapter after training."""
        return self.layout.unflatten(self.start + self.change)


class State(Protocol):
    """A method's global state: tensors that safetensors can store, plus plain JSON values."""

    def tensors(self) -> dict[str, Tensor]: ...

    def facts(self) -> dict[str, Any]: ...


class Method(Protocol):
    """One federated LoRA method; see the module docstring, and `flasc.py` for one."""

    weights: str  # "uniform" or "examples": the paper's aggregation weights
    optimizer: str  # the paper's server optimizer
    optimizers: tuple[str, ...]  # server optimizers that make sense with it

    def init(self, adapter: Adapter, seed: int) -> Any: ...

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Any: ...

    def broadcast(self, state: Any, client: Profile) -> Start: ...

    def trainable(self, state: Any, client: Profile) -> Trainable: ...

    def aggregate(self, state: Any, updates: Iterable[Update], advance: Advance = ...) -> Any: ...

    def delta(self, state: Any, layer: str) -> LowRank | Tensor: ...

    def adapter(self, state: Any) -> Adapter: ...


def received(payload: Payload) -> Tensor | None:
    """Which entries arrived in a payload: boolean (n,), or None where all did."""
    if payload.indices is None:
        return None
    mask = torch.zeros(payload.n, dtype=torch.bool)
    mask[payload.indices] = True
    return mask


def fedavg(name: str, value: Tensor, change: Tensor) -> Tensor:
    """The plainest server step: add the mean change."""
    return value + change


def mean_change(updates: Iterable[Update], size: int) -> Tensor:
    """``sum_k p_k change_k`` as float32 (n,); p_k are the weights scaled to sum 1. Consumes updates one at a time.

    Sums in float64, in the order given: memory stays at one vector whatever the cohort, and rounding of the sum is
    below that of its terms.
    """
    total, weights = torch.zeros(size, dtype=torch.float64), 0.0
    for update in updates:
        total += update.weight * update.change.double()
        weights += update.weight
    if weights <= 0:
        raise ValueError("no update with a positive weight to aggregate")
    return (total / weights).float()
