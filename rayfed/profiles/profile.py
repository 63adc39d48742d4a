"""A client in one round, as methods and weightings see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """One client in one round: who it is and what its device and link allow."""

    client: int
    rank: int
    scale: float = 1.0  # of its adapter: alpha / r, or alpha / sqrt(r)
    density_down: float = 1.0  # share of entries it receives this round, in (0, 1]
    density_up: float = 1.0  # share of entries it sends this round, in (0, 1]
    examples: int = 1  # training rows it holds

    @property
    def tier(self) -> tuple[int, float]:
        """Clients of one tier receive the same payload, unless the method is `personal`."""
        return self.rank, self.density_down
