"""Both ends of the wire: what a download fills, what an upload holds, and how uploads of a pack are summed.

No message carries what the other side knows. A download leaves out the entries that the client has already; an upload
leaves out the entries that cannot have changed or that stay personal. Both sides derive these entries from the same
`ClientOrder`, so no index bits are spent on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from rayfed import seeding, wire
from rayfed.channels import Channel
from rayfed.clients.local_training import PackMember, TrainedClient
from rayfed.clients.messages import ClientOrder, uploads_by_part
from rayfed.errors import RunError
from rayfed.lora.adapter import Layout
from rayfed.methods import Method, PackSum, Sparse
from rayfed.privacy import Privacy
from rayfed.wire import Payload


@dataclass(frozen=True)
class Uploadable:
    """The entries of an adapter (n,) that a client may send up: ``places`` (m,) int64, ascending; None: all."""

    n: int
    places: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Uploadable:
        """The entries where ``mask`` (n,), boolean, is true."""
        return cls(len(mask), None if bool(mask.all()) else mask.nonzero().squeeze(1))

    def same(self, other: Uploadable) -> bool:
        """True if both are the same entries."""
        if self.places is None or other.places is None:
            return self.places is other.places and self.n == other.n
        return self.n == other.n and torch.equal(self.places, other.places)

    def placed(self, payload: Payload) -> Tensor | Sparse:
        """An upload of these entries, as a change of the whole adapter. RunError where it has another length."""
        candidates = self.n if self.places is None else len(self.places)
        if payload.n != candidates:
            raise RunError(f"an upload has {payload.n} entries where {candidates} may be sent")
        if self.places is None:
            return payload.values if payload.indices is None else Sparse(self.n, payload.indices, payload.values)
        places = self.places if payload.indices is None else self.places[payload.indices]
        return Sparse(self.n, places, payload.values)


def assemble(layout: Layout, payload: Payload, known: Payload | None) -> tuple[Tensor, Tensor | None]:
    """(start (n,), has (n,)): a client's start values, and the entries for which it has a value (None: all).

    ``known`` holds the entries that the client has already, at their indices. ``payload`` fills the others, in order.
    """
    if known is None and payload.indices is None:
        return payload.dense(), None
    has = torch.zeros(layout.size, dtype=torch.bool)
    if known is None:
        has[payload.indices] = True
        return payload.dense(), has
    start = known.dense()
    has[slice(None) if known.indices is None else known.indices] = True
    travels = (~has).nonzero().squeeze(1)
    start[travels] = payload.dense()
    has[travels if payload.indices is None else travels[payload.indices]] = True
    return start, has


def upload(
    method: Method, result: TrainedClient, member: PackMember, order: ClientOrder, privacy: Privacy | None, t: int,
    seed: int,
) -> bytes:  # fmt: skip
    """The client's upload in round ``t``: of the changes to the entries that trained, those that the method selects.

    ``seed``: the run's, which keys the random rounding of the number formats that have one.

    Both sides know that entries outside the support have not changed and that personal entries stay at the client, so
    neither of them takes index bits. The top-k of the upload is taken here (`Method.select`; by default `wire.top_k`).
    The result is finite: see `rayfed.clients.divergence`.
    """
    uploaded = order.trainable.uploaded(member.layout, member.support)
    change = (result.vector - member.start) * uploaded
    if privacy is not None:
        change = privacy.client_change(change, uploaded, order.budget, t, member.client)
    values, indices = change[uploaded], None
    if order.budget < len(values):
        chosen = method.select(member.start, change, member.layout, order.budget, order.density_up)
        place = torch.cumsum(uploaded, 0) - 1
        indices = place[chosen[uploaded[chosen]]]
    rounding = seeding.derive_seed(seed, "rounding.up", t, member.client)
    return wire.encode(values, indices=indices, values=order.values, seed=rounding)


def sums(
    channel: Channel, uploads: Sequence[bytes | None], members: Sequence[PackMember], orders: Sequence[ClientOrder],
    parts: Sequence[int],
) -> tuple[PackSum, ...]:  # fmt: skip
    """The sums of a pack's uploads, one for each of its ``parts`` (numbers of clients) that has uploads.

    An upload is None if the client was dropped. The uploads are decoded as the server would decode them, so a sum has
    the same bits wherever it is computed.
    """

    def changes() -> Iterator[tuple[float, Tensor | Sparse]]:  # one decoded upload is in memory at a time
        for payload, member, order in zip(uploads, members, orders, strict=True):
            if payload is not None:
                places = Uploadable.of(order.trainable.uploaded(member.layout, member.support))
                yield order.weight, places.placed(wire.decode(channel.deliver(payload)))

    stream, counts = changes(), uploads_by_part(uploads, parts)
    return tuple(PackSum.of(islice(stream, count), members[0].layout.size) for count in counts)


def personal_values(result: TrainedClient, member: PackMember, order: ClientOrder) -> bytes | None:
    """The client's personal entries after training, encoded; None where nothing is personal. They are no traffic."""
    if not order.trainable.personal:
        return None
    personal = member.layout.mask(*order.trainable.personal)
    return wire.encode(result.vector * personal)
