"""The rank and the densities of every client, from the settings under `profiles`.

A profile is a pure function of the settings, the client and its number of training rows. It is the same in every
process, and in every round except for the decay of the densities. Nothing is stored per client, so a population may
have millions of clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np

from rayfed import seeding
from rayfed.config.method import Lora, Profiles, Wire
from rayfed.errors import UserError, allowed
from rayfed.lora.adapter import scale_of
from rayfed.plugins import load_object
from rayfed.profiles.profile import Profile
from rayfed.profiles.rules import Rule, Tier, make_rule

MOST_EXAMINED = 100_000  # with more clients, statistics of the population are those of a random sample of this size


class ClientProfiles:
    """The profiles of all clients. Raises UserError if `profiles.function` cannot be imported."""

    def __init__(self, settings: Profiles, lora: Lora, wire: Wire, seed: int) -> None:
        self.settings, self.lora, self.wire, self.seed = settings, lora, wire, seed
        self.function = load_object(settings.function, "profiles.function") if settings.function else None
        if self.function is not None and not callable(self.function):
            raise allowed("profiles.function", settings.function, "that is no function")

    @cached_property
    def tier_of(self) -> Rule:
        """(client, number of its training rows) -> the client's tier."""
        return make_rule(self.settings, self.lora, self.wire, self.seed, self.function)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "tier_of"}  # a rule is not pickled

    def profile(self, client: int, examples: int, t: int) -> Profile:
        """The client's profile in round ``t`` (from 0). ``examples`` is its number of training rows.

        Raises UserError if the user's function returns an invalid value.
        """
        return self.of_tier(self.tier_of(client, examples), t, client, examples)

    def of_tier(self, tier: Tier, t: int, client: int = -1, examples: int = 1) -> Profile:
        """The profile of a client of this tier in round ``t`` (from 0)."""
        rank = self.lora.rank if self.settings.scale == "server" else tier.rank
        return Profile(
            client=client,
            rank=tier.rank,
            scale=scale_of(rank, self.lora.alpha, self.lora.rslora),
            density_down=self.wire.down.density_at(t, tier.density_down),
            density_up=self.wire.up.density_at(t, tier.density_up),
            examples=examples,
            density_fixed=self.wire.down.density_at(1, tier.density_down),
            head_whole=self.wire.down.head == "dense",
        )

    @property
    def mixed_ranks(self) -> bool:
        """Whether the settings allow a client with another rank than the server (lora.rank).

        A user's function counts as mixed, because its values are unknown.
        """
        own, largest = self.settings, self.lora.rank
        if own.kind in ("uniform", "normal"):
            return own.low < largest  # otherwise low = high = largest
        return own.kind == "function" or any(rank != largest for rank in own.ranks or ())

    def may_be_sparse(self, direction: Literal["down", "up"], rounds: int) -> bool:
        """Whether the settings allow a density below 1 in one of the first ``rounds`` rounds."""
        wire = getattr(self.wire, direction)
        own = getattr(self.settings, f"densities_{direction}")
        return bool(wire.density_at(rounds - 1, None if own is None else min(own)) < 1)

    def check(self, sizes: np.ndarray, everyone: bool = False) -> None:
        """Raises UserError if the profiles do not fit the population. ``sizes`` (clients,): training rows per client.

        A list needs one entry per client. A user's function must return a valid value for every client with training
        rows, or ``everyone`` (for 100,000 random ones, if there are more), and the same value when it is called again.
        """
        own = self.settings
        if own.kind == "list" and own.entries != len(sizes):
            raise UserError(
                f"profiles.{next(iter(own.lists))}: got {own.entries} values, but the population has {len(sizes)} "
                "clients"
            )
        if own.kind == "function":
            for client in self._examined(sizes, everyone).tolist():
                tier, again = (self.tier_of(client, int(sizes[client])) for _ in range(2))
                if again != tier:
                    what = f"it gave client {client} first {tuple(tier)}, then {tuple(again)} (rank, densities)"
                    raise allowed("profiles.function", own.function, what)

    def tier_mix(self, sizes: np.ndarray, everyone: bool = False) -> dict[Tier, int]:
        """The number of clients with training rows, or of ``everyone``, in each tier, smallest rank first.

        ``sizes`` (clients,): training rows per client. If a tier depends on more than the client's number and there are
        more than 100,000 such clients, the counts are those of 100,000 random clients (keyed by the seed).
        """
        own = self.settings
        mix: Counter[Tier] = Counter()
        if own.kind == "same" or (own.kind == "tiers" and own.weights is None):
            tiers = own.entries or 1
            counts = np.bincount(_counted(sizes, everyone) % tiers, minlength=tiers)
            for i in np.flatnonzero(counts):
                mix[self.tier_of(int(i), 0)] += int(counts[i])
        else:
            mix.update(self.tier_of(int(c), int(sizes[c])) for c in self._examined(sizes, everyone))
        return dict(sorted(mix.items()))

    def rank_mix(self, sizes: np.ndarray) -> dict[int, int]:
        """The number of clients with training rows of each rank, smallest first; see `tier_mix`."""
        mix: Counter[int] = Counter()
        for tier, count in self.tier_mix(sizes).items():
            mix[tier.rank] += count
        return dict(mix)

    def _examined(self, sizes: np.ndarray, everyone: bool) -> np.ndarray:
        """All counted clients, or MOST_EXAMINED random ones. Evenly spaced clients could share one tier."""
        clients = _counted(sizes, everyone)
        if len(clients) <= MOST_EXAMINED:
            return clients
        return seeding.numpy_rng(self.seed, "profile.mix").choice(clients, MOST_EXAMINED, replace=False)


def _counted(sizes: np.ndarray, everyone: bool) -> np.ndarray:
    """The clients with training rows, or all."""
    return np.arange(len(sizes)) if everyone else np.flatnonzero(sizes)


def describe(mix: Mapping[int, int]) -> str:
    """A rank mix in words, such as `rank 4: 75.0 %, rank 16: 25.0 %`.

    Of more than 8 ranks: their range, their mean and the three most frequent.
    """
    total = sum(mix.values())
    named = sorted(mix, key=lambda rank: -mix[rank])[:3] if len(mix) > 8 else list(mix)
    shares = [f"rank {rank}: {mix[rank] / total:.1%}".replace("%", " %") for rank in named]
    if len(mix) > len(named):
        mean = sum(rank * count for rank, count in mix.items()) / total
        return f"{len(mix)} ranks from {min(mix)} to {max(mix)}, mean {mean:.1f}; most often {', '.join(shares)}"
    return ", ".join(shares)
