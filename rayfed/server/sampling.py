"""Who takes part: the cohort of a round, and what each of its clients can do."""

from __future__ import annotations

import numpy as np

from rayfed import keys
from rayfed.config import Experiment
from rayfed.methods import Profile


def cohort(sizes: np.ndarray, count: int, seed: int, t: int) -> list[int]:
    """``count`` distinct clients for round ``t``, uniform among those that hold data, in the order drawn.

    ``sizes`` (clients,): training rows per client. Every run seed has its own cohorts. ValueError where too few
    clients hold data.
    """
    holders = np.flatnonzero(sizes)
    if count > len(holders):
        raise ValueError(f"cannot draw {count} clients from {len(holders)} that hold data")
    return [int(c) for c in keys.numpy_rng(seed, "cohort", t).choice(holders, size=count, replace=False)]


def profile(client: int, examples: int, experiment: Experiment, t: int) -> Profile:
    """The client's rank and densities in round ``t``."""
    return Profile(
        client=client,
        rank=experiment.lora.rank,
        density_down=experiment.wire.down.density_at(t),
        density_up=experiment.wire.up.density_at(t),
        examples=examples,
    )
