"""An objective's messages beside the adapter: encoded and decoded alike at both ends of the wire.

Of a vector only the entries travel that the client may upload; both sides know these, so they take no index bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rayfed import seeding, wire
from rayfed.clients.local_training import PackMember, TrainedClient
from rayfed.clients.messages import ClientOrder, EncodedMessage
from rayfed.clients.transfer import Uploadable
from rayfed.methods import Sparse
from rayfed.objectives import ClassStatistics, ClientRound, Message, Objective, Stateful
from rayfed.wire import Payload


def encode_message(
    message: Message, places: Uploadable, values: str, seed: int, budget: int | None = None
) -> EncodedMessage:
    """The message as payloads. ``values``: the number format of the vector, of which the largest ``budget`` travel.

    ``seed`` keys the random rounding of the number formats that have one.
    """
    vector = None
    if message.vector is not None:
        entries = message.vector if places.places is None else message.vector[places.places]
        indices = wire.top_k(entries, budget) if budget is not None and budget < len(entries) else None
        vector = wire.encode(entries, indices=indices, values=values, seed=seed)
    return EncodedMessage(vector, None if message.numbers is None else wire.encode(message.numbers))


def decode_message(vector: Payload | None, numbers: Payload | None, places: Uploadable) -> Message:
    """The message that these payloads hold; its vector (n,) is 0 where nothing arrived."""
    placed = None if vector is None else places.placed(vector)
    entries = placed.dense() if isinstance(placed, Sparse) else placed
    return Message(entries, None if numbers is None else numbers.values)


def decode_encoded(message: EncodedMessage, places: Uploadable) -> Message:
    """`decode_message` of a message that has not been decoded yet."""
    vector, numbers = (None if part is None else wire.decode(part) for part in (message.vector, message.numbers))
    return decode_message(vector, numbers, places)


def client_round(
    order: ClientOrder,
    decoded: Sequence[Payload],
    start: Tensor,
    support: Tensor,
    lr: float,
    products: tuple[str, ...] = (),
) -> ClientRound:
    """What the objective knows of the client. ``decoded``: the job's payloads; ``start`` and ``support`` are (n,).

    ``products``: the adapted layers in model order, if the method averages products.
    """
    own = order.objective
    assert own is not None
    vector, numbers, stored = (None if at is None else decoded[at] for at in (own.vector, own.numbers, own.stored))
    uploaded, rates = order.trainable.uploaded(order.layout, support), torch.full((order.layout.size,), lr)
    for part, factor in order.trainable.rates.items():
        rates[order.layout.mask(part)] *= factor
    received = decode_message(vector, numbers, Uploadable.of(uploaded))
    own_values = None if stored is None else stored.values
    return ClientRound(start, uploaded, rates, received, own_values, None, order.layout, products)


def replies(
    objective: Objective, trained: Sequence[tuple[TrainedClient, PackMember, ClientOrder] | None],
    statistics: Sequence[ClassStatistics | None], t: int, seed: int,
) -> tuple[tuple[EncodedMessage | None, ...], tuple[bytes | None, ...]]:  # fmt: skip
    """The clients' messages after training in round ``t``, and what each has in its next round, encoded.

    None: it was dropped. Both are empty without a stateful objective. ``statistics`` are what the objective measures of
    each client. ``seed`` is the run's.
    """
    if not isinstance(objective, Stateful):
        return (), ()
    found = [
        (None, None) if client is None else _reply(objective, *client, measured, t, seed)
        for client, measured in zip(trained, statistics, strict=True)
    ]
    return tuple(message for message, _ in found), tuple(stored for _, stored in found)


def _reply(
    objective: Stateful, result: TrainedClient, member: PackMember, order: ClientOrder,
    measured: ClassStatistics | None, t: int, seed: int,
) -> tuple[EncodedMessage, bytes | None]:  # fmt: skip
    assert member.context is not None
    client = replace(member.context, statistics=measured)
    places = Uploadable.of(client.uploaded)
    message = objective.message(client, result.vector, result.steps, result.twin)
    rounding = seeding.derive_seed(seed, "rounding.objective.up", t, member.client)
    encoded = encode_message(message, places, order.values, rounding, order.budget)
    stored = objective.store(client, decode_encoded(encoded, places))
    return encoded, None if stored is None else wire.encode(stored)
