"""The clients of a round: who takes part (the cohort), and who trains together (the packs).

Packs decide bits, because they decide the order of sums. So the packs are a function of the settings and the data,
never of the worker that is idle. A client's cost is the number of tokens on which it trains in a round. Clients are
dealt out in order of falling cost, each to the cheapest pack that has room. So packs cost about the same, and no worker
is left with the longest pack at the end (Graham's rule: with as many workers as packs, a round takes at most 4/3 of the
shortest possible time, if no pack fills up).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Literal

import numpy as np

from rayfed import seeding
from rayfed.clients.plan import RunPlan
from rayfed.config.training import Client
from rayfed.profiles.profile import Profile
from rayfed.tasks.data.federation import Federation


def cohort(
    candidates: np.ndarray, count: int, seed: int, t: int, sampling: Literal["fixed", "poisson"] = "fixed"
) -> list[int]:
    """``count`` distinct clients for round ``t``, uniform among the ``candidates``, in the order drawn.

    With ``sampling`` poisson ``count`` is their mean number: every candidate takes part by a draw of its own, all with
    the same probability. A draw takes time for the cohort, not for the population. Every run seed has its own cohorts.
    ValueError where there are too few candidates.
    """
    if sampling == "poisson":  # given their number, all sets of so many candidates are equally likely
        q = count / len(candidates)
        count = int(seeding.numpy_rng(seed, "cohort.size", t).binomial(len(candidates), q))
    drawn: list[int] = seeding.numpy_rng(seed, "cohort", t).choice(candidates, size=count, replace=False).tolist()
    return drawn


def cohort_of(plan: RunPlan, t: int) -> list[int]:
    """The cohort of round ``t`` (from 0) of a run."""
    return cohort(plan.candidates(t), plan.server.cohort, plan.seed, t, plan.server.sampling)


def client_costs(federation: Federation, settings: Client) -> np.ndarray:
    """Tokens that each client trains on in a round, (clients,) float64; 0 for clients without data."""
    sizes = federation.sizes
    ends = np.concatenate([[0], np.cumsum(federation.train.lengths[federation.rows], dtype=np.float64)])
    tokens = ends[federation.starts[1:]] - ends[federation.starts[:-1]]
    if settings.steps is None:
        return tokens * settings.epochs
    mean = tokens / np.maximum(sizes, 1)
    return settings.steps * np.minimum(settings.batch_size, sizes) * mean


class RoundCosts:
    """The `client_costs` of each round of a plan: computed once, or once for each experience."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._costs: dict[int | None, np.ndarray] = {}  # by experience

    def at(self, t: int) -> np.ndarray:
        """Those of round ``t`` (from 0)."""
        experience = self._plan.experience(t)
        if experience not in self._costs:
            self._costs[experience] = client_costs(self._plan.federation_at(t), self._plan.client)
        return self._costs[experience]


def plan_packs(clients: Sequence[Profile], size: int, costs: np.ndarray) -> list[list[Profile]]:
    """The cohort in as few packs of at most ``size`` clients as possible, the costliest pack first.

    ``costs`` (clients of the population,) are `client_costs`. Within a pack, clients have the order of the cohort.
    """
    count = -(-len(clients) // size)
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    with_room = [(0.0, p) for p in range(count)]  # a heap: the lightest first, of these the first
    cost = [float(costs[client.client]) for client in clients]
    for i in sorted(range(len(clients)), key=lambda i: -cost[i]):
        _, lightest = heappop(with_room)
        packs[lightest].append(i)
        loads[lightest] += cost[i]
        if len(packs[lightest]) < size:
            heappush(with_room, (loads[lightest], lightest))
    order = sorted(range(count), key=lambda p: -loads[p])
    return [[clients[i] for i in sorted(packs[p])] for p in order]
