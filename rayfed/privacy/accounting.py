"""What Gaussian noise guarantees: epsilon after any number of uses, and the noise for a given epsilon.

The figures are those of dp-accounting (Google), with its conversion from Renyi divergences (RDP) or privacy loss
distributions (PLD). z is the standard deviation of the noise divided by the clip norm C. Who is a neighbour follows
from how the units (clients, or rows) are sampled:

    poisson    each unit takes part with probability q; one unit more or less changes the sum by C        RDP, PLD
    fixed      a sample of one size without replacement; one unit is replaced, which changes it by 2 C    RDP
    all        every unit takes part; one unit is replaced, which changes the sum by 2 C                  RDP, PLD

So where a unit is replaced, noise of z C counts as z / 2. No privacy loss distribution is known for `fixed`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

from rayfed.errors import UserError, allowed

Accountant = Literal["pld", "rdp"]
Sampling = Literal["poisson", "fixed", "all"]
MOST_NOISE = 2.0**30
PRECISION = 1e-3  # of calibrated noise, relative


@dataclass(frozen=True)
class Uses:
    """``count`` noised sums, each over a sample of the units: ``sample`` of ``population`` units take part, in the mean
    with `poisson`, always with `fixed`."""

    count: int
    sampling: Sampling
    sample: float = 1
    population: float = 1

    def epsilon(self, z: float, delta: float, accountant: Accountant) -> float:
        """Epsilon at ``delta`` with noise of z C on each sum; infinity without noise."""
        if not self.count:
            return 0.0
        if not z:
            return math.inf
        if self.sampling == "all" and accountant == "pld":  # the sum of Gaussian losses is one: exact
            import dp_accounting

            return float(dp_accounting.get_epsilon_gaussian(z / 2 / math.sqrt(self.count), delta))
        if accountant == "pld":
            whole = _distribution(self.sample / self.population, z).self_compose(self.count)
            return float(whole.get_epsilon_for_delta(delta))
        return _renyi_epsilon(self, z, delta)


@dataclass(frozen=True)
class Guarantee:
    """How epsilon follows from the noise: its ``delta`` and its accountant."""

    delta: float
    accountant: Accountant

    def epsilon(self, uses: Sequence[Uses], z: float) -> float:
        """The largest epsilon over the units, of whose uses ``uses`` are those that can be the worst."""
        return max((own.epsilon(z, self.delta, self.accountant) for own in uses), default=0.0)

    def noise(self, uses: Sequence[Uses], epsilon: float) -> float:
        """The least z, up to 0.1 %, with which the uses stay within ``epsilon``. UserError where there is none."""

        def enough(z: float) -> bool:
            return self.epsilon(uses, z) <= epsilon

        high = 1.0
        while not enough(high):
            high *= 2
            if high > MOST_NOISE:
                raise allowed("privacy.target_epsilon", epsilon, "no noise reaches it in so many rounds at this delta")
        low = high / 2
        while enough(low):
            low, high = low / 2, low
        while high > low * (1 + PRECISION):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def rounds(self, uses: Callable[[int], Sequence[Uses]], z: float, epsilon: float, most: int) -> int:
        """How many rounds stay within ``epsilon``, from 0 to ``most``; ``uses(t)`` are the uses of ``t`` rounds."""
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(uses(middle), z) <= epsilon else (low, middle)
        return low


def guarantee(delta: float, wanted: Literal["auto", "pld", "rdp"], sampling: Sampling) -> Guarantee:
    """The guarantee with the accountant that is meant. UserError where the sampling has none of that kind."""
    if sampling == "fixed" and wanted == "pld":
        raise allowed(
            "privacy.accountant", wanted, "there is no privacy loss distribution for cohorts of a fixed size; auto and "
            "rdp are allowed, and pld with server.sampling=poisson",
        )  # fmt: skip
    chosen: Accountant = "rdp" if sampling == "fixed" or wanted == "rdp" else "pld"
    return Guarantee(delta, chosen)


def check_installed() -> None:
    """UserError where dp-accounting is missing."""
    if find_spec("dp_accounting") is None:
        raise UserError(
            "privacy.noise_multiplier: noise needs dp-accounting, which is not installed; in a clone of rayfed: "
            "pip install -c constraints.txt -e '.[privacy]'; 0 is allowed without it"
        )


@lru_cache(maxsize=64)  # it takes longer than to compose it
def _distribution(q: float, z: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(z, sampling_prob=q)


@lru_cache(maxsize=4096)
def _renyi_epsilon(uses: Uses, z: float, delta: float) -> float:
    import dp_accounting as dp
    from dp_accounting import rdp

    replaced = uses.sampling != "poisson"
    event: dp.DpEvent = dp.GaussianDpEvent(z / 2 if replaced else z)
    if uses.sampling == "poisson":
        event = dp.PoissonSampledDpEvent(uses.sample / uses.population, event)
    elif uses.sampling == "fixed":
        event = dp.SampledWithoutReplacementDpEvent(int(uses.population), int(uses.sample), event)
    relation = dp.NeighboringRelation.REPLACE_ONE if replaced else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    log = logging.getLogger("absl")
    log.addFilter(_silent)  # it warns of every order that it leaves out; the bound by the others holds
    try:
        return float(accountant.compose(event, uses.count).get_epsilon(delta))
    finally:
        log.removeFilter(_silent)


def _silent(record: logging.LogRecord) -> bool:
    return False
