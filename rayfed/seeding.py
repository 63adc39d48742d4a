"""Keyed randomness: the key of a random draw is (run seed, purpose, parts), as in (0, "batches", round 3, client 7).

A draw depends on its key alone, never on the process or on earlier draws. So worker count, arrival order, retries and
resumes cannot change a result.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Part = int | str


def derive_seed(seed: int, purpose: str, *parts: Part) -> int:
    """The seed of one draw, from 0 to 2^63 - 1: SHA-256 of the run seed, the purpose and the parts.

    ``parts`` are integers (round, client, step) or strings (layer names). 1 and "1" give different seeds.
    """
    # NumPy integers must give the same seed as Python integers, so only the value counts.
    named = (f"str:{part}" if isinstance(part, str) else f"int:{operator.index(part)}" for part in parts)
    text = "\x1f".join([str(seed), purpose, *named])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextmanager
def python_random(seed: int, purpose: str, *parts: Part) -> Iterator[None]:
    """Seeds the module `random` for the named draw, for code that uses it. Afterwards it goes on as before."""
    state = random.getstate()
    random.seed(derive_seed(seed, purpose, *parts))
    try:
        yield
    finally:
        random.setstate(state)


def numpy_rng(seed: int, purpose: str, *parts: Part) -> np.random.Generator:
    """A NumPy generator (PCG64) for the named draw."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *parts)))


def torch_rng(seed: int, purpose: str, *parts: Part) -> torch.Generator:
    """A CPU torch generator for the named draw. A draw on the CPU has the same bits whatever device trains."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, purpose, *parts))
