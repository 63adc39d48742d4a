"""The rules that give a client its tier (rank and densities): one rule for every `profiles.kind`.

In a random rule, every client has one number u in (0, 1), keyed by (run seed, "profile", client). The rank is the
quantile of u in the distribution that the settings describe. u does not depend on the settings: if shares, limits or
the spread change, most clients have the same rank as before. A larger u gives the larger rank for `uniform` and
`normal`, and the later entry of `ranks` for `tiers` and `heavy_tailed`.
"""

from __future__ import annotations

import reprlib
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from rayfed import seeding
from rayfed.config.method import Lora, Profiles, Wire
from rayfed.errors import UserError, allowed, class_and_line


class Tier(NamedTuple):
    """The rank and the densities of a client, before the decay of the densities."""

    rank: int
    density_down: float
    density_up: float


Rule = Callable[[int, int], Tier]
"""(client, number of its training rows) -> tier of the client."""


def make_rule(settings: Profiles, lora: Lora, wire: Wire, seed: int, function: Callable[..., Any] | None) -> Rule:
    """The rule of `profiles.kind`; ``function`` is the one that `profiles.function` names.

    The rule raises UserError if the function fails or returns an invalid value.
    """
    densities = wire.down.density, wire.up.density
    low, high = settings.low, settings.high or lora.rank
    ranks, down, up = settings.ranks, settings.densities_down, settings.densities_up

    def entry(i: int) -> Tier:
        return Tier(
            lora.rank if ranks is None else ranks[i],
            densities[0] if down is None else down[i],
            densities[1] if up is None else up[i],
        )

    def by_shares(shares: list[float]) -> Rule:
        edges = list(accumulate(shares))
        return lambda client, examples: entry(bisect_right(edges, _u(seed, client) * edges[-1]))

    match settings.kind:
        case "same":
            return lambda client, examples: Tier(lora.rank, *densities)
        case "list":
            return lambda client, examples: entry(client)
        case "tiers" if settings.weights is None:
            tiers = settings.entries
            return lambda client, examples: entry(client % tiers)
        case "tiers":
            assert settings.weights is not None
            return by_shares([weight / max(settings.weights) for weight in settings.weights])
        case "heavy_tailed":
            assert settings.ranks is not None
            return by_shares([float(rank) ** -settings.exponent for rank in settings.ranks])
        case "uniform":
            return lambda client, examples: Tier(low + int(_u(seed, client) * (high - low + 1)), *densities)
        case "normal":
            mean = (low + high) / 2 if settings.mean is None else settings.mean
            normal = NormalDist(mean, settings.std or (high - low) / 4 or 1.0)
            return lambda client, examples: Tier(
                round(min(max(normal.inv_cdf(_u(seed, client)), low), high)), *densities
            )
        case "function":
            assert function is not None
            return _user_rule(function, settings.function or "", lora.rank, densities, seed)


def _u(seed: int, client: int) -> float:
    """The client's number u, uniform in the open interval (0, 1): (52 random bits + 1/2) / 2^52.

    u is at most 1 - 2^-53, so u * x, rounded, is below x for any positive x.
    """
    return ((seeding.derive_seed(seed, "profile", client) >> 11) + 0.5) * 2.0**-52


def _user_rule(
    function: Callable[..., Any], path: str, largest: int, densities: tuple[float, float], seed: int
) -> Rule:
    """The rule of a user's function; it checks every value that the function returns."""

    def invalid(client: int, what: str) -> UserError:
        return allowed("profiles.function", path, f"for client {client} it {what}")

    def rule(client: int, examples: int) -> Tier:
        try:
            answer = function(client=client, examples=examples, seed=seed)
        except Exception as error:
            raise invalid(client, f"raised {class_and_line(error)}") from error
        rank, down, up = answer if isinstance(answer, tuple | list) and len(answer) == 3 else (answer, *densities)
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 1 <= rank <= largest:
            what = f"it should be a rank from 1 to {largest} (lora.rank), or (rank, density_down, density_up)"
            raise invalid(client, f"returned {reprlib.repr(answer)}; {what}")
        for density in (down, up):
            if isinstance(density, bool) or not isinstance(density, int | float | np.floating) or not 0 < density <= 1:
                raise invalid(client, f"returned {reprlib.repr(answer)}; densities should be in (0, 1]")
        return Tier(int(rank), float(down), float(up))

    return rule
