"""What a pack gives back after training: each client's upload as bytes, or their sum, and what clients keep.

A sum is that of the uploads as the server would decode them, so that it makes no difference to any bit whether worker
or server adds them up; it only saves the driver the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.local_training import Member, Trained
from rayfed.clients.messages import Order
from rayfed.clients.transfer import Uploadable
from rayfed.errors import RunError
from rayfed.methods import Method, Summed
from rayfed.methods.base import Sparse


def upload(method: Method, result: Trained, member: Member, order: Order) -> bytes:
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
    uploads: Sequence[bytes], members: Sequence[Member], orders: Sequence[Order], parts: Sequence[int]
) -> tuple[Summed, ...]:
    """The uploads of a pack, summed up by its parts of so many clients."""

    def change(payload: bytes, member: Member, order: Order) -> tuple[float, Tensor | Sparse]:
        places = Uploadable.of(order.trainable.uploaded(member.layout, member.support))
        return order.weight, places.placed(wire.decode(payload))

    changes = map(change, uploads, members, orders)  # one at a time: of all, only the sum is in memory
    return tuple(Summed.of(islice(changes, part), members[0].layout.size) for part in parts)


def kept(result: Trained, member: Member, order: Order) -> bytes | None:
    """The client's personal entries after training, for the simulation to give back to it; no traffic."""
    if not order.trainable.personal:
        return None
    personal = member.layout.mask(*order.trainable.personal)
    return wire.encode(result.vector * personal)
