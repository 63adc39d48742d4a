"""Who takes part: the cohort of a round."""

from __future__ import annotations

import numpy as np

from rayfed import keys


def cohort(sizes: np.ndarray, count: int, seed: int, t: int) -> list[int]:
    """``count`` distinct clients for round ``t``, uniform among those that hold data, in the order drawn.

    ``sizes`` (clients,): training rows per client. Every run seed has its own cohorts. ValueError where too few
    clients hold data.
    """
    holders = np.flatnonzero(sizes)
    if count > len(holders):
        raise ValueError(f"cannot draw {count} clients from {len(holders)} that hold data")
    return [int(c) for c in keys.numpy_rng(seed, "cohort", t).choice(holders, size=count, replace=False)]
