"""Keyed randomness: every random draw belongs to (run seed, purpose, and whatever else names it).

A draw never depends on the process that makes it or on what was drawn before. So worker count, arrival order,
retries and resumes cannot change a result: whoever needs "client 7's batch order in round 3" asks for exactly that.
"""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Part = int | str


def derive_seed(seed: int, purpose: str, *parts: Part) -> int:
    """A 63-bit key for one draw: SHA-256 of the run seed, the purpose and the parts that name the draw.

    ``parts`` may be integers (round, client, step) or strings (layer names); 1 and "1" give different keys.
    """
    # By value, not by type name: NumPy's integers name the same draw as Python's.
    named = (f"str:{part}" if isinstance(part, str) else f"int:{operator.index(part)}" for part in parts)
    text = "\x1f".join([str(seed), purpose, *named])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_rng(seed: int, purpose: str, *parts: Part) -> np.random.Generator:
    """A NumPy generator (PCG64) for the named draw."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *parts)))


def torch_rng(seed: int, purpose: str, *parts: Part) -> torch.Generator:
    """A CPU torch generator for the named draw. Drawing on the CPU keeps the bits equal on every device."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, purpose, *parts))
