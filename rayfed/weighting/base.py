"""The base class of weightings."""

from __future__ import annotations

from rayfed.profiles.profile import Profile


class Weighting:
    """Gives every client of a cohort a weight. Only the ratios of the weights matter: the server divides by their
    sum."""

    def weight(self, client: Profile) -> float:
        """The client's weight, 0 or more, before it is divided by the cohort's sum."""
        raise NotImplementedError
