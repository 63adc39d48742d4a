"""The base class of weightings."""

from __future__ import annotations

from rayfed.profiles.profile import Profile


class Weighting:
    """Gives every client of a cohort a weight. Only ratios matter: methods divide by the cohort's sum."""

    def weight(self, client: Profile) -> float:
        """The client's weight: 0 or more, finite. A client of weight 0 does not count."""
        raise NotImplementedError
