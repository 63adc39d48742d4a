"""The downloads of a round: the payloads, each encoded once, and what every client has already.

`Downlink` turns a method's `Start` into bytes: of the entries that the client does not know, the largest or the masked
ones travel. The client trains from what these bytes decode to, and `aggregate` gets the same values. Known entries
and the frozen change of the base reach the workers too, because the client has them; they are no traffic.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rayfed import seeding, wire
from rayfed.clients.plan import RunPlan
from rayfed.clients.transfer import Uploadable, assemble
from rayfed.errors import RunError
from rayfed.lora.adapter import Layout, LowRank, flatten_changes
from rayfed.methods import BaseChange, Start, Trainable, matrix
from rayfed.profiles.profile import Profile
from rayfed.server.executor import Executor, Handle
from rayfed.wire.qsgd import BITS as QSGD


@dataclass(frozen=True)
class Download:
    """What one tier (or clients of a personal method) receives in a round.

    ``vector`` (n,) is what it starts from and ``has`` (n,) marks the entries for which it has a value (None: all).
    """

    start: Start
    payloads: tuple[bytes, ...]  # the traffic: the adapter, and a change to merge
    handle: Handle  # of the adapter's payload
    vector: Tensor
    has: Tensor | None
    known: Handle | None = None
    base: tuple[Handle, Layout] | None = None
    merge: tuple[Handle, Layout] | None = None
    _cached: list[tuple[Trainable, int, Uploadable]] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def sizes(self) -> tuple[wire.Sizes, ...]:
        """What its payloads hold, as their headers say."""
        return tuple(map(wire.inspect, self.payloads))

    def uploadable(self, trainable: Trainable) -> Uploadable:
        """The entries that a client may send up."""
        return self._limits(trainable)[1]

    def budget(self, trainable: Trainable, density: float) -> int:
        """How many entries it may send: that share of those that could train, had everything arrived."""
        return wire.keep_count(self._limits(trainable)[0], density)

    def model(self) -> tuple[Tensor, Layout]:
        """The client's model: its start adapter over its base, as one vector (n,) with its layout."""
        adapter = self.start.layout.unflatten(self.vector)
        changes: dict[str, LowRank | Tensor] = {name: pair.folded() for name, pair in adapter.layers.items()}
        for name, below in self.start.merged_base.items():
            changes[name] = matrix(below) + matrix(changes[name]) if name in changes else matrix(below)
        return flatten_changes(changes, adapter.head)

    def _limits(self, trainable: Trainable) -> tuple[int, Uploadable]:
        """Computed once for clients whose trainable entries are the same."""
        if not self._cached or not self._cached[0][0].same_support(trainable):
            layout = self.start.layout
            most = int(trainable.uploaded(layout, trainable.support(layout, None)).sum())
            mask = trainable.uploaded(layout, trainable.support(layout, self.has))
            self._cached[:] = [(trainable, most, Uploadable.of(mask))]
        return self._cached[0][1:]


class Downlink:
    """The downloads of round ``t`` (from 0), made on demand from the ``state`` with which it begins."""

    def __init__(self, plan: RunPlan, state: Any, t: int, executor: Executor) -> None:
        self.plan, self.method, self.state, self.t, self.executor = plan, plan.method, state, t, executor
        self.first: Download | None = None
        self._made: dict[Hashable, Download] = {}
        self._of_start: WeakValueDictionary[Hashable, Download] = WeakValueDictionary()  # by the start's identity
        self._bases: dict[int, tuple[BaseChange, Handle, Layout]] = {}  # by identity; the base is kept alive beside it

    def of(self, client: Profile) -> Download:
        """The client's download. RunError where the global state is not finite any more."""
        key: Hashable = client.client if self.method.personal else client.tier
        if key not in self._made:
            self._made[key] = self._make(client, key)
            self.first = self.first or self._made[key]
        return self._made[key]

    def forget(self, client: Profile) -> None:
        """Frees a personal download after its last use: the driver's memory must not grow with the cohort."""
        if self.method.personal:
            self._made.pop(client.client, None)

    def _make(self, client: Profile, key: Hashable) -> Download:
        start = self.method.broadcast(self.state, client)
        values = self.plan.wire.down.values
        same = id(start), client.density_down, client.head_whole
        if values not in QSGD and (equal := self._of_start.get(same)) is not None:
            return equal
        if not bool(torch.isfinite(start.vector).all()):
            raise RunError("the global adapter has values that are not finite; lower server.lr or client.lr")
        travels = slice(None) if start.known is None else ~start.known
        vector = start.vector[travels]
        whole = start.layout.mask("head")[travels] if client.head_whole else None
        mask = None if start.mask is None else start.mask[travels]
        if mask is None and not start.dense and client.density_down < 1:
            mask = wire.top_mask(vector, client.density_down, whole)
        elif mask is not None and whole is not None:
            mask = mask | whole
        rounding = seeding.derive_seed(self.plan.seed, "rounding.down", self.t, str(key))
        indices = None if mask is None else mask.nonzero().squeeze(1)
        payload = wire.encode(vector, indices=indices, values=values, seed=rounding)
        arrived = self.plan.channel.deliver(payload)
        known, has_already = None, None
        if start.known is not None:
            encoded = wire.encode(start.vector, indices=start.known.nonzero().squeeze(1))
            known, has_already = self.executor.put(encoded), wire.decode(encoded)
        decoded, has = assemble(start.layout, wire.decode(arrived), has_already)
        payloads: tuple[bytes, ...] = (payload,)
        merge = None
        if start.merge is not None:
            beside = wire.encode(start.merge.flatten())
            payloads, merge = (payload, beside), (self.executor.put(beside), start.merge.layout)
        handle, base = self.executor.put(arrived), self._base(start.base)
        download = self._of_start[same] = Download(start, payloads, handle, decoded, has, known, base, merge)
        return download

    def _base(self, base: BaseChange) -> tuple[Handle, Layout] | None:
        if not base:
            return None
        if id(base) in self._bases:
            return self._bases[id(base)][1:]
        vector, layout = flatten_changes(base)
        handle = self.executor.put(wire.encode(vector))
        if not self.method.personal:  # another client never has this client's base
            self._bases[id(base)] = base, handle, layout
        return handle, layout
