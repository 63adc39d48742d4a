"""Which rank and densities every client has, by the settings under `profiles`.

A profile is a pure function of the settings and the client (its id and its number of rows): the same in every process
and round, but for the wire's density decay. Nothing is stored per client, so a population may have millions of clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np

from rayfed import seeding
from rayfed.config.method import Lora, Profiles, Wire
from rayfed.errors import UserError, allowed
from rayfed.lora.adapter import scale_of
from rayfed.profiles.profile import Profile
from rayfed.profiles.rules import Tier, make_rule

MOST_EXAMINED = 100_000  # clients that are asked for their tier, at most, to learn about a population


class ClientProfiles:
    """Every client's profile. Raises UserError where `profiles.function` cannot be imported."""

    def __init__(self, settings: Profiles, lora: Lora, wire: Wire, seed: int) -> None:
        self.settings, self.lora, self.wire, self.seed = settings, lora, wire, seed
        self.tier_of = make_rule(settings, lora, wire, seed)

    def profile(self, client: int, examples: int, t: int) -> Profile:
        """The client's rank, scale and densities in round ``t``; ``examples``: its number of training rows.

        UserError where a user's function gives a wrong answer.
        """
        return self.of_tier(self.tier_of(client, examples), t, client, examples)

    def of_tier(self, tier: Tier, t: int, client: int = -1, examples: int = 1) -> Profile:
        """The profile of any client of the tier in round ``t``."""
        return Profile(
            client=client,
            rank=tier.rank,
            scale=self.scale(tier.rank),
            density_down=self.wire.down.density_at(t, tier.density_down),
            density_up=self.wire.up.density_at(t, tier.density_up),
            examples=examples,
        )

    def scale(self, rank: int) -> float:
        """The factor on B A for a client of that rank; see `profiles.scale`."""
        lora = self.lora
        return scale_of(lora.rank if self.settings.scale == "server" else rank, lora.alpha, lora.rslora)

    @property
    def mixed_ranks(self) -> bool:
        """Whether a client may have another rank than the server (lora.rank), by the settings alone.

        A user's function counts as mixed, because its answers are not known.
        """
        own, largest = self.settings, self.lora.rank
        if own.kind in ("uniform", "normal"):
            return own.low < largest  # else low = high = largest
        return own.kind == "function" or any(rank != largest for rank in own.ranks or ())

    def may_be_sparse(self, direction: Literal["down", "up"], rounds: int) -> bool:
        """Whether a client's density may be below 1 in one of so many rounds, by the settings alone."""
        wire = getattr(self.wire, direction)
        own = getattr(self.settings, f"densities_{direction}")
        return bool(wire.density_at(rounds - 1, None if own is None else min(own)) < 1)

    def check(self, sizes: np.ndarray) -> None:
        """Refuses (UserError) profiles that do not fit the population. ``sizes`` (clients,): training rows per client.

        A list needs one entry a client. A user's function must give every client that holds data (of more than 100,000,
        so many of them) a rank, and the same one when it is asked again.
        """
        own = self.settings
        if own.kind == "list" and own.entries != len(sizes):
            raise UserError(
                f"profiles.{next(iter(own.lists))}: got {own.entries} values, but the population has {len(sizes)} "
                "clients"
            )
        if own.kind == "function":
            clients = self._examined(sizes)
            answers = [self.tier_of(int(c), int(sizes[c])) for c in clients]
            for client, answer in zip(clients, answers):
                again = self.tier_of(int(client), int(sizes[client]))
                if again != answer:
                    what = f"it gave client {client} first {tuple(answer)}, then {tuple(again)} (rank, densities)"
                    raise allowed("profiles.function", own.function, what)

    def tier_mix(self, sizes: np.ndarray) -> dict[Tier, int]:
        """How many clients that hold data belong to each tier, smallest rank first.

        ``sizes`` (clients,): training rows per client. Exact where tiers follow from the id alone, and for up to
        100,000 clients with data; of more, so many are drawn (by a key of their own), and the counts are theirs.
        """
        own = self.settings
        mix: Counter[Tier] = Counter()
        if own.kind == "same" or (own.kind == "tiers" and own.weights is None):
            tiers = own.entries or 1
            counts = np.bincount(np.flatnonzero(sizes) % tiers, minlength=tiers)
            for i in np.flatnonzero(counts):
                mix[self.tier_of(int(i), 0)] += int(counts[i])
        else:
            mix.update(self.tier_of(int(c), int(sizes[c])) for c in self._examined(sizes))
        return dict(sorted(mix.items()))

    def rank_mix(self, sizes: np.ndarray) -> dict[int, int]:
        """How many clients that hold data have each rank, smallest first; see `tier_mix`."""
        mix: Counter[int] = Counter()
        for tier, count in self.tier_mix(sizes).items():
            mix[tier.rank] += count
        return dict(mix)

    def _examined(self, sizes: np.ndarray) -> np.ndarray:
        """All clients that hold data, or 100,000 of them by chance: evenly spaced ones could all be of one tier."""
        holders = np.flatnonzero(sizes)
        if len(holders) <= MOST_EXAMINED:
            return holders
        return seeding.numpy_rng(self.seed, "profile.mix").choice(holders, MOST_EXAMINED, replace=False)


def describe(mix: Mapping[int, int]) -> str:
    """A rank mix in words: `rank 4: 75.0 %, rank 16: 25.0 %`; of many ranks their span, mean and most frequent."""
    total = sum(mix.values())
    named = sorted(mix, key=lambda rank: -mix[rank])[:3] if len(mix) > 8 else list(mix)
    shares = [f"rank {rank}: {mix[rank] / total:.1%}".replace("%", " %") for rank in named]
    if len(mix) > len(named):
        mean = sum(rank * count for rank, count in mix.items()) / total
        return f"{len(mix)} ranks from {min(mix)} to {max(mix)}, mean {mean:.1f}; most often {', '.join(shares)}"
    return ", ".join(shares)
