"""Local privacy: each client clips its change and adds noise before it sends, and trusts nobody.

Client k of clip norm C and noise multiplier z uploads, of the m entries that it may send,

    c_k min(1, C / ||c_k||) + z C N(0, I_m)            replacing the client's data changes the clipped change by 2 C

and everything after that is post-processing: the rounding of the wire, any method, any server. So every method is
taken that needs no more than uploads. There is no amplification by sampling: epsilon is that of a client's own
participations, and the client that took part most often counts.

Which entries are the largest is itself a release. With `mask: noised` a sparse upload has the largest entries of the
noised change. With `mask: random` its entries are drawn before, and known; the others are set to zero before the
clipping, and get no noise. A client whose training diverged sends noise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.privacy.accounting import Uses
from rayfed.privacy.base import Privacy
from rayfed.privacy.noise import gaussian
from rayfed.seeding import torch_rng


@dataclass(frozen=True)
class Local(Privacy):
    """Clipped and noised uploads. ``participations``: for each round, how often the client that took part most often
    has done so by then."""

    participations: tuple[int, ...]

    always_sends = True

    def uses(self, rounds: int) -> Sequence[Uses]:
        return [Uses(self.participations[rounds - 1] if rounds else 0, "all")]

    def client_change(self, change: Tensor, uploaded: Tensor, budget: int, t: int, client: int) -> Tensor:
        own, key = self.settings, (t, client)
        places = uploaded.nonzero().squeeze(1)
        if own.mask == "random" and budget < len(places):
            order = torch.randperm(len(places), generator=torch_rng(self.seed, "privacy.mask", *key))
            places = places[order[:budget].sort().values]
        values = change[places].double()
        size = float(torch.linalg.vector_norm(values))
        values *= min(1.0, own.clip_norm / size) if size else 1.0
        std = self.noise_multiplier * own.clip_norm
        values += gaussian(len(places), std, own.noise, self.seed, "privacy.client", *key)
        return torch.zeros_like(change).index_copy_(0, places, values.to(change))


def most_participations(cohorts: Callable[[int], Sequence[int]], rounds: int) -> tuple[int, ...]:
    """For each of so many rounds, how often the client that was drawn most often was drawn up to then."""
    counts: dict[int, int] = {}
    most, found = 0, []
    for t in range(rounds):
        for client in cohorts(t):
            counts[client] = counts.get(client, 0) + 1
            most = max(most, counts[client])
        found.append(most)
    return tuple(found)
