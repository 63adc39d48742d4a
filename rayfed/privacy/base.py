"""The base class of privacy mechanisms: where clipping and noise may happen, and what they guarantee.

A mechanism is built once, by `rayfed.privacy.build`, and is part of the plan. Server, clients and local training call
the functions below; here none of them changes anything. docs/privacy.md says who is trusted and what is released.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from rayfed.config.privacy import Privacy as Settings
from rayfed.methods import Method
from rayfed.privacy.accounting import Guarantee, Uses

if TYPE_CHECKING:
    from rayfed.privacy.user import Release


@dataclass(frozen=True)
class Privacy:
    """The privacy of a run. ``noise_multiplier`` is z, given or calibrated; ``guarantee`` says what it amounts to.

    ``rounds``: the rounds that the budget allows, at most those of the run.
    """

    settings: Settings
    seed: int
    guarantee: Guarantee
    noise_multiplier: float
    rounds: int

    always_sends: ClassVar[bool] = False
    """Whether a client whose training diverged sends an upload all the same."""

    def check(self) -> None:
        """UserError where the noise and the settings do not go together."""

    def uses(self, rounds: int) -> Sequence[Uses]:
        """The noised sums of so many rounds in which the worst client, or row, can have taken part."""
        raise NotImplementedError

    def epsilon(self, rounds: int) -> float | None:
        """Epsilon after so many rounds; None where it is infinite."""
        epsilon = self.guarantee.epsilon(self.uses(rounds), self.noise_multiplier)
        return epsilon if math.isfinite(epsilon) else None

    def describe(self) -> str:
        """One line for the log of a run that begins."""
        z, cost = self.noise_multiplier, self.cost(self.rounds)
        return f"privacy: {self.settings.kind} level, noise multiplier {z:.4g}; {self.rounds} rounds: {cost}"

    def cost(self, rounds: int) -> str:
        """What so many rounds cost, in words: `epsilon 2 at delta 1e-05`, and of which deployment."""
        own, epsilon = self.settings, self.epsilon(rounds)
        if epsilon is None:
            return "clipping without noise, no guarantee"
        cohort, population = own.noise_cohort, own.noise_population
        whose = f" of a deployment with {cohort:,} of {population:,} clients a round" if cohort else ""
        return f"epsilon {epsilon:.3g} at delta {own.delta:g}{whose}"

    def release(self, method: Method, state: Any, t: int, moments: MutableMapping[str, Tensor]) -> Release | None:
        """What the server does with the updates of round ``t`` (from 0), before the method gets them; None: nothing.

        ``moments`` are tensors by name that are stored until the next round.
        """
        return None

    def client_change(self, change: Tensor, uploaded: Tensor, budget: int, t: int, client: int) -> Tensor:
        """What a client selects its upload from, at most ``budget`` entries. ``change`` (n,) is its change, with zeros
        outside of ``uploaded`` (n,)."""
        return change
