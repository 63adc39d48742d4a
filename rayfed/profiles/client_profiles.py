"""Who can do what: every client's rank and densities, by the settings under `profiles`.

A profile is a pure function of the settings and the client (its id and how many rows it holds): the same in every
process and round, but for the wire's density decay. Nothing is kept, so a population may have millions of clients.

Where chance decides, a client has one number u in (0, 1), keyed by (run seed, "profile", client), and the settings say
which rank stands at that quantile: its u does not change with the settings. So when shares, limits or the spread
change, most clients keep what they had, and `tiers`, `heavy_tailed` (both in the order of `ranks`), `uniform` and
`normal` all give a client with a larger u the later entry or the larger rank.
"""

from __future__ import annotations

import importlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import accumulate
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

from rayfed import seeding
from rayfed.config import Experiment
from rayfed.errors import UserError, allowed
from rayfed.lora.adapter import scale_of
from rayfed.methods import Profile

LOOKED_AT = 100_000  # clients that are looked at, at most, to learn about a population


class Tier(NamedTuple):
    """What a client's device and link allow, before the density decays."""

    rank: int
    density_down: float
    density_up: float


Rule = Callable[[int, int], Tier]
"""(client, the training rows it holds) -> its tier."""


def profile(client: int, examples: int, experiment: Experiment, t: int) -> Profile:
    """The client's rank, scale and densities in round ``t``. UserError where a user's function gives no such thing."""
    tier = rule(experiment)(client, examples)
    return Profile(
        client=client,
        rank=tier.rank,
        scale=client_scale(tier.rank, experiment),
        density_down=experiment.wire.down.density_at(t, tier.density_down),
        density_up=experiment.wire.up.density_at(t, tier.density_up),
        examples=examples,
    )


def client_scale(rank: int, experiment: Experiment) -> float:
    """What a client of that rank multiplies B A by; see `profiles.scale`."""
    lora = experiment.lora
    return scale_of(lora.rank if experiment.profiles.scale == "server" else rank, lora.alpha, lora.rslora)


def mixed(experiment: Experiment) -> bool:
    """May a client have another rank than the server (lora.rank)? So it is wherever two clients' ranks differ.

    By the settings alone; what a user's function answers is not known, so with one: yes.
    """
    own, largest = experiment.profiles, experiment.lora.rank
    if own.kind in ("uniform", "normal"):
        return own.low < largest  # else low = high = largest
    return own.kind == "function" or any(rank != largest for rank in own.ranks or ())


def sparse(experiment: Experiment, direction: Literal["down", "up"]) -> bool:
    """May a client's density be below 1 in some round? By the settings alone; a user's function: see `tier_mix`."""
    wire = getattr(experiment.wire, direction)
    own = getattr(experiment.profiles, f"densities_{direction}")
    return wire.density_at(experiment.server.rounds - 1, None if own is None else min(own)) < 1


def check_profiles(experiment: Experiment, sizes: np.ndarray | None = None) -> None:
    """Refuses (UserError) what the settings' schema cannot know.

    Without ``sizes``, before there are data: can the user's function be imported? With ``sizes`` (clients,), the
    training rows of each client: has a list one entry for each, and does the function give each client that holds data
    (of more than 100,000, so many of them) a rank, and the same when asked again?
    """
    own = experiment.profiles
    asked = rule(experiment)
    if sizes is None:
        return
    if own.kind == "list" and own.entries != len(sizes):
        raise UserError(
            f"profiles.{next(iter(own.lists))}: got {own.entries} values, but the population has {len(sizes)} clients"
        )
    if own.kind == "function":
        clients = _looked_at(sizes, experiment.seed)
        answers = [asked(int(c), int(sizes[c])) for c in clients]
        for client, answer in zip(clients, answers):
            again = asked(int(client), int(sizes[client]))
            if again != answer:
                raise allowed(
                    "profiles.function",
                    own.function,
                    f"it gave client {client} first {tuple(answer)}, then {tuple(again)} (rank, densities)",
                )


def tier_mix(experiment: Experiment, sizes: np.ndarray) -> dict[Tier, int]:
    """How many clients that hold data have which tier, smallest rank first.

    ``sizes`` (clients,): training rows per client. Exact where tiers follow from the id alone and for up to 100,000
    clients with data; of more, so many are drawn (by a key of their own), and the counts are theirs.
    """
    own, asked = experiment.profiles, rule(experiment)
    mix: Counter[Tier] = Counter()
    if own.kind == "same" or (own.kind == "tiers" and own.weights is None):
        tiers = own.entries or 1
        counts = np.bincount(np.flatnonzero(sizes) % tiers, minlength=tiers)
        for i in np.flatnonzero(counts):
            mix[asked(int(i), 0)] += int(counts[i])
    else:
        mix.update(asked(int(c), int(sizes[c])) for c in _looked_at(sizes, experiment.seed))
    return dict(sorted(mix.items()))


def rank_mix(experiment: Experiment, sizes: np.ndarray) -> dict[int, int]:
    """How many clients that hold data have which rank, smallest first; see `tier_mix`."""
    mix: Counter[int] = Counter()
    for tier, count in tier_mix(experiment, sizes).items():
        mix[tier.rank] += count
    return dict(mix)


def describe(mix: Mapping[int, int]) -> str:
    """A rank mix in words: `rank 4: 75.0 %, rank 16: 25.0 %`; of many ranks their span, mean and most frequent."""
    total = sum(mix.values())
    named = sorted(mix, key=lambda rank: -mix[rank])[:3] if len(mix) > 8 else list(mix)
    shares = [f"rank {rank}: {mix[rank] / total:.1%}".replace("%", " %") for rank in named]
    if len(mix) > len(named):
        return f"{len(mix)} ranks from {min(mix)} to {max(mix)}, mean {_mean(mix):.1f}; most often {', '.join(shares)}"
    return ", ".join(shares)


def rule(experiment: Experiment) -> Rule:
    """How the settings give a client its tier. Cheap: nothing is computed for clients that are not asked about."""
    own, lora, seed = experiment.profiles, experiment.lora, experiment.seed
    wire = experiment.wire.down.density, experiment.wire.up.density
    low, high = own.low, own.high or lora.rank
    ranks, down, up = own.ranks, own.densities_down, own.densities_up

    def entry(i: int) -> Tier:
        return Tier(
            lora.rank if ranks is None else ranks[i],
            wire[0] if down is None else down[i],
            wire[1] if up is None else up[i],
        )

    def by_shares(shares: list[float]) -> Rule:
        edges = list(accumulate(shares))
        return lambda client, examples: entry(bisect_right(edges, _u(seed, client) * edges[-1]))

    match own.kind:
        case "same":
            return lambda client, examples: Tier(lora.rank, *wire)
        case "list":
            return lambda client, examples: entry(client)
        case "tiers" if own.weights is None:
            tiers = own.entries
            return lambda client, examples: entry(client % tiers)
        case "tiers":
            assert own.weights is not None
            return by_shares([weight / max(own.weights) for weight in own.weights])
        case "heavy_tailed":
            assert own.ranks is not None
            return by_shares([float(rank) ** -own.exponent for rank in own.ranks])
        case "uniform":
            return lambda client, examples: Tier(low + int(_u(seed, client) * (high - low + 1)), *wire)
        case "normal":
            mean = (low + high) / 2 if own.mean is None else own.mean
            law = NormalDist(mean, own.std or (high - low) / 4 or 1.0)
            return lambda client, examples: Tier(round(min(max(law.inv_cdf(_u(seed, client)), low), high)), *wire)
        case "function":
            return _users(experiment)


def _u(seed: int, client: int) -> float:
    """The client's own number, uniform in the open interval (0, 1): 52 bits of its key, and a half.

    It is at most 1 - 2^-53, so its product with a positive x stays below x after rounding.
    """
    return ((seeding.derive_seed(seed, "profile", client) >> 11) + 0.5) * 2.0**-52


def _looked_at(sizes: np.ndarray, seed: int) -> np.ndarray:
    """All clients that hold data, or 100,000 of them by chance: evenly spaced ones could all be of one tier."""
    holders = np.flatnonzero(sizes)
    if len(holders) <= LOOKED_AT:
        return holders
    return seeding.numpy_rng(seed, "profile.mix").choice(holders, LOOKED_AT, replace=False)


def _mean(mix: Mapping[int, int]) -> float:
    return sum(rank * count for rank, count in mix.items()) / sum(mix.values())


def _users(experiment: Experiment) -> Rule:
    """The rule that a user's function gives, with every answer checked."""
    path, largest = experiment.profiles.function, experiment.lora.rank
    wire = experiment.wire.down.density, experiment.wire.up.density
    function = _imported(path or "")

    def refused(client: int, what: str) -> UserError:
        return allowed("profiles.function", path, f"for client {client} it {what}")

    def checked(client: int, examples: int) -> Tier:
        try:
            answer = function(client=client, examples=examples, seed=experiment.seed)
        except Exception as error:
            raise refused(client, f"raised {type(error).__name__}: {_one_line(error)}") from error
        rank, down, up = answer if isinstance(answer, tuple | list) and len(answer) == 3 else (answer, *wire)
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 1 <= rank <= largest:
            raise refused(
                client,
                f"returned {_one_line(repr(answer))}; it should be a rank from 1 to {largest} (lora.rank), or "
                "(rank, density_down, density_up)",
            )
        for density in (down, up):
            if isinstance(density, bool) or not isinstance(density, int | float | np.floating) or not 0 < density <= 1:
                raise refused(client, f"returned {_one_line(repr(answer))}; densities should be in (0, 1]")
        return Tier(int(rank), float(down), float(up))

    return checked


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise allowed(
            "profiles.function",
            path,
            f"{module} cannot be imported ({type(error).__name__}: {_one_line(error)}); is its folder on PYTHONPATH?",
        ) from error
    if not callable(function):
        raise allowed("profiles.function", path, f"{module} has no function {name}")
    return function


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 120 else line[:117] + "..."
