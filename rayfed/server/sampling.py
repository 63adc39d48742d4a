"""Who takes part: the cohort of a round."""

from __future__ import annotations

import numpy as np

from rayfed import seeding as keys


def cohort(holders: np.ndarray, count: int, seed: int, t: int) -> list[int]:
    """``count`` distinct clients for round ``t``, uniform among those that hold data, in the order drawn.

    ``holders``: the clients that hold data. A draw takes time for ``count`` clients, not for the population. Every run
    seed has its own cohorts. ValueError where too few clients hold data.
    """
    if count > len(holders):
        raise ValueError(f"cannot draw {count} clients from {len(holders)} that hold data")
    drawn: list[int] = keys.numpy_rng(seed, "cohort", t).choice(holders, size=count, replace=False).tolist()
    return drawn
