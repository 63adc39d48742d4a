"""The profile of a client in one round, which methods and weightings read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """One client in one round: its number, its data, and what its device and link allow."""

    client: int
    rank: int
    scale: float = 1.0  # the factor on B A: alpha / r, or alpha / sqrt(r) with lora.rslora
    density_down: float = 1.0  # share of entries it receives this round, in (0, 1]
    density_up: float = 1.0  # share of entries it sends this round, in (0, 1]
    examples: int = 1  # number of its training rows
    density_fixed: float | None = None  # its density_down in round 1 (from 0), for masks that are cut then; None: now's
    head_whole: bool = False  # whether its downloads have the whole head, and density_down is that of the rest

    @property
    def tier(self) -> tuple[int, float, float | None]:
        """(rank, densities down). Clients of one tier receive the same payload, unless the method is `personal`."""
        return self.rank, self.density_down, self.density_fixed
