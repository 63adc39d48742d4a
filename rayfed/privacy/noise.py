"""Gaussian noise: a function of the run's seed, so that simulations repeat, or drawn from the operating system."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rayfed.seeding import Part, numpy_rng


def gaussian(
    size: int, std: float, source: Literal["keyed", "secret"], seed: int, purpose: str, *parts: Part
) -> Tensor:
    """Independent normal numbers (size,), float64, of the standard deviation ``std``; zeros where it is 0.

    ``source`` keyed: the draw is keyed by (seed, purpose, parts), see `rayfed.seeding`. secret: nothing repeats it.
    """
    if not std:
        return torch.zeros(size, dtype=torch.float64)
    rng = numpy_rng(seed, purpose, *parts) if source == "keyed" else np.random.default_rng()
    return torch.from_numpy(rng.standard_normal(size)).mul_(std)
