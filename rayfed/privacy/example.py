"""Example-level privacy (Abadi et al., arXiv 1607.00133): each client clips its rows' gradients and adds noise.

In a local step of client k with n_k rows, each row is in the batch by a draw of its own, with probability q_k = b_k /
n_k and b_k = min(`client.batch_size`, n_k). With g_i the gradient of row i, C the clip norm, z the noise multiplier:

    g = (sum_i g_i min(1, C / ||g_i||) + z C N(0, I)) / b_k

The denominator is the expected batch. There are as many steps as without privacy; a step whose batch is empty is a step
of noise alone. The optimizer, and all that follows, is post-processing; the client is trusted, the server is not.
Neighbours differ in one row of one client. How many rows a client has is taken as known. Epsilon is that of the client
for which it is largest: it depends on n_k, and on how often the client took part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayfed.config.training import Client
from rayfed.privacy.accounting import Uses
from rayfed.privacy.base import Privacy
from rayfed.seeding import numpy_rng


@dataclass(frozen=True)
class ExampleLevel(Privacy):
    """Clipped gradients of rows, noise on their sum. ``worst``: for each round, the uses up to then of the clients of
    which none is surely better off than another one."""

    worst: tuple[tuple[Uses, ...], ...]

    def uses(self, rounds: int) -> Sequence[Uses]:
        return self.worst[rounds - 1] if rounds else ()

    def batches(self, rows: np.ndarray, settings: Client, t: int, client: int) -> list[np.ndarray]:
        """A client's batches for round ``t``, some of them empty. A client without rows has none."""
        n = len(rows)
        q = expected_batch(n, settings) / max(n, 1)
        draws = (numpy_rng(self.seed, "privacy.batch", t, client, step) for step in range(steps(n, settings)))
        return [rows[rng.random(n) < q] for rng in draws]


def expected_batch(rows: int, settings: Client) -> int:
    """b_k: the mean size of the batches of a client with so many rows."""
    return min(settings.batch_size, rows)


def steps(rows: int, settings: Client) -> int:
    """Local steps in a round of a client with so many rows."""
    if not rows:
        return 0
    return settings.steps if settings.steps is not None else -(-rows // settings.batch_size) * settings.epochs


def worst_clients(
    cohorts: Callable[[int], Sequence[int]], sizes: Sequence[int], settings: Client, rounds: int
) -> tuple[tuple[Uses, ...], ...]:
    """`ExampleLevel.worst` of a run: ``sizes`` are the clients' numbers of rows.

    A client can only be the worst if none with as large a q_k has as many steps behind it.
    """
    done: dict[int, int] = {}  # steps so far, by client
    most: dict[int, int] = {}  # the most steps of a client with so many rows
    found: list[tuple[Uses, ...]] = []
    for t in range(rounds):
        for client in cohorts(t):
            n = int(sizes[client])
            done[client] = done.get(client, 0) + steps(n, settings)
            most[n] = max(most.get(n, 0), done[client])
        found.append(_front(most, settings))
    return tuple(found)


def _front(most: Mapping[int, int], settings: Client) -> tuple[Uses, ...]:
    """The uses of the numbers of rows that can be the worst."""
    front: list[Uses] = []
    for n in sorted(most):  # q falls with the number of rows
        if n and most[n] > (front[-1].count if front else 0):
            batch = expected_batch(n, settings)
            if front and front[-1].sample * n == batch * front[-1].population:  # q = 1 for both
                front.pop()
            front.append(Uses(most[n], "poisson", batch, n))
    return tuple(front)
