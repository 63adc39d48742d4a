"""Uploads over the air (`channel.kind: over_the_air`): the server receives one noisy sum, and few digital numbers.

The simulation gets the clients' changes as bytes, which stand for their signals: they are in no ledger. What is digital
is in the ledger: mean and standard deviation of each client's change go up, its weight and eta down. See
`rayfed.channels.over_the_air` for the equations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed import wire
from rayfed.channels import OverTheAir
from rayfed.errors import RunError
from rayfed.methods import Update
from rayfed.profiles.profile import Profile
from rayfed.server.cohort_weights import Arrived, senders
from rayfed.server.downlink import Downlink


@dataclass
class Transmission:
    """Round ``t`` (from 0) on the air. ``eta`` is None where no client had a signal."""

    channel: OverTheAir
    t: int
    ledger: wire.Ledger
    truncated: int = 0  # clients that sent nothing, because their channel was too weak
    uses: int = 0  # channel uses
    eta: float | None = None

    def figures(self) -> dict[str, float | None]:
        """The metrics `channel/...` of the round."""
        return {"channel/uses": self.uses, "channel/eta": self.eta, "channel/truncated": self.truncated}

    def without_weak(self, cohort: Iterable[Arrived]) -> list[Arrived]:
        """The results without the uploads of clients whose channel is too weak."""
        left = []
        for pack, result in cohort:
            uploads = tuple(
                None if abs(self.channel.fading(self.t, client.client)) ** 2 < self.channel.truncation else upload
                for (client, _), upload in zip(pack, result.uploads, strict=True)
            )
            self.truncated += uploads.count(None) - result.uploads.count(None)
            left.append((pack, replace(result, uploads=uploads)))
        return left

    def update(self, cohort: Sequence[Arrived], downlink: Downlink) -> Iterator[Update]:
        """The estimate of the clients' weighted sum, as one update of weight 1; none where nobody sends.

        The weights in the orders sum to 1. All clients send the same entries.
        """
        sending = [*senders(cohort)]
        if not sending:
            return
        counts = {wire.inspect(upload).count for _, _, upload in sending}
        if len(counts) > 1:
            raise RunError(f"channel.kind: over the air all clients send the same entries, but they sent {counts}")
        side = [self._exchanged("up", client, *_moments(upload)) for client, _, upload in sending]
        means, stds = torch.tensor(side, dtype=torch.float64).unbind(1)
        fading = [self.channel.fading(self.t, client.client) for client, _, _ in sending]
        weights = torch.tensor([order.weight for _, order, _ in sending]).float().double()  # as they arrive
        eta = self.channel.scaling(torch.tensor(fading, dtype=torch.complex128), weights, stds)
        signals = torch.zeros(*counts, dtype=torch.complex128)
        for (client, _, upload), h, weight, mean, std in zip(sending, fading, weights.tolist(), *map(list, zip(*side))):
            _, arrived = self._exchanged("down", client, weight, eta or 0.0)
            if eta is not None:
                self.eta = arrived
                signals += h * self.channel.signal(_change(upload), h, weight, mean, std, arrived)
        estimate = torch.full((len(signals),), float(weights @ means), dtype=torch.float64)
        if self.eta is not None:
            self.uses = len(signals)
            estimate += self.channel.received(signals, self.t) / self.eta**0.5
        client, order, _ = sending[0]
        received = downlink.of(client)
        change = received.uploadable(order.trainable).placed(wire.Payload(len(estimate), None, estimate.float()))
        yield Update(replace(client, client=-1), 1.0, received.vector, change, order.layout)

    def _exchanged(self, direction: wire.Direction, client: Profile, *numbers: float) -> tuple[float, float]:
        """Two numbers as they arrive, in float32; they are recorded."""
        payload = wire.encode(torch.tensor(numbers, dtype=torch.float32))
        self.ledger.add(round=self.t + 1, client=client.client, direction=direction, payload=payload)
        first, second = wire.decode(payload).values.tolist()
        return first, second


def _change(upload: bytes) -> Tensor:
    """The entries of a client's change (d,), float64."""
    return wire.decode(upload).values.double()


def _moments(upload: bytes) -> tuple[float, float]:
    change = _change(upload)
    return float(change.mean()), float(change.std(correction=0))
