"""Both ends of the wire: what a download fills, what an upload holds, and how uploads of a pack are summed.

No message carries what the other side knows. A download leaves out the entries that the client has already; an upload
leaves out the entries that cannot have changed or that stay personal. Both sides derive these entries from the same
`ClientOrder`, so no index bits are spent on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from rayfed import wire
from rayfed.channels import Channel
from rayfed.clients.local_training import PackMember, TrainedClient
from rayfed.clients.messages import ClientOrder
from rayfed.errors import RunError
from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.lora.algebra import add
from rayfed.methods import Method, PackSum
from rayfed.methods.base import BaseChange, Sparse
from rayfed.wire import Payload


@dataclass(frozen=True)
class Uploadable:
    """The entries of an adapter (n,) that a client may send up: ``places`` (m,) int64, rising; None: all."""

    n: int
    places: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Uploadable:
        """The entries where ``mask`` (n,), boolean, is true."""
        return cls(len(mask), None if bool(mask.all()) else mask.nonzero().squeeze(1))

    def placed(self, payload: Payload) -> Tensor | Sparse:
        """An upload of these entries, as a change of the whole adapter. RunError where it has another length."""
        candidates = self.n if self.places is None else len(self.places)
        if payload.n != candidates:
            raise RunError(f"an upload has {payload.n} entries where {candidates} may be sent")
        if self.places is None:
            return payload.values if payload.indices is None else Sparse(self.n, payload.indices, payload.values)
        places = self.places if payload.indices is None else self.places[payload.indices]
        return Sparse(self.n, places, payload.values)


def received(payload: Payload) -> Tensor | None:
    """Which entries arrived in a payload: boolean (n,), or None where all did."""
    if payload.indices is None:
        return None
    mask = torch.zeros(payload.n, dtype=torch.bool)
    mask[payload.indices] = True
    return mask


def assemble(layout: Layout, payload: Payload, held: Payload | None) -> tuple[Tensor, Tensor | None]:
    """What a client starts from (n,), and which entries it has a value for (n,), None: all.

    ``payload`` fills the entries that it does not hold, in their order; ``held`` has the others at their indices.
    """
    arrived = received(payload)
    if held is None:
        return payload.dense(), arrived
    start, has = held.dense(), torch.zeros(layout.size, dtype=torch.bool)
    has[slice(None) if held.indices is None else held.indices] = True
    travels = ~has
    start[travels] = payload.dense()
    has[travels] = True if arrived is None else arrived
    return start, has


def merged_base(base: BaseChange, merge: Adapter | None) -> BaseChange:
    """The change of the base under a client's adapter, once the client has merged what it received for that."""
    merged: dict[str, LowRank | Tensor] = dict(base)
    for name, pair in (merge.layers if merge else {}).items():
        below = merged.get(name)
        dense = below.dense() if isinstance(below, LowRank) else below
        merged[name] = pair if dense is None else add(dense, pair)
    return merged


def upload(method: Method, result: TrainedClient, member: PackMember, order: ClientOrder) -> bytes:
    """What the client sends: of its changes to the entries that trained, those the method picks.

    Entries outside the support are known to both sides not to have changed, and personal ones stay: neither takes
    index bits.
    """
    uploaded = order.trainable.uploaded(member.layout, member.support)
    change = (result.vector - member.start) * uploaded
    if not bool(torch.isfinite(change).all()):
        raise RunError(
            f"client {member.client}: training gave values that are not finite; lower client.lr or set client.clip_norm"
        )
    values, indices = change[uploaded], None
    if order.budget < len(values):
        chosen = method.select(member.start, change, member.layout, order.budget, order.density_up)
        place = torch.cumsum(uploaded, 0) - 1
        indices = place[chosen[uploaded[chosen]]]
    return wire.encode(values, indices=indices, values=order.values)


def sums(
    channel: Channel,
    uploads: Sequence[bytes],
    members: Sequence[PackMember],
    orders: Sequence[ClientOrder],
    parts: Sequence[int],
) -> tuple[PackSum, ...]:
    """The uploads of a pack, summed up by its parts of so many clients."""

    def change(payload: bytes, member: PackMember, order: ClientOrder) -> tuple[float, Tensor | Sparse]:
        places = Uploadable.of(order.trainable.uploaded(member.layout, member.support))
        return order.weight, places.placed(wire.decode(channel.deliver(payload)))

    changes = map(change, uploads, members, orders)  # one at a time: of all, only the sum is in memory
    return tuple(PackSum.of(islice(changes, part), members[0].layout.size) for part in parts)


def personal_values(result: TrainedClient, member: PackMember, order: ClientOrder) -> bytes | None:
    """The client's personal entries after training, for the simulation to give back to it; no traffic."""
    if not order.trainable.personal:
        return None
    personal = member.layout.mask(*order.trainable.personal)
    return wire.encode(result.vector * personal)
