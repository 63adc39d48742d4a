"""All clients count alike."""

from __future__ import annotations

from rayfed.profiles.profile import Profile
from rayfed.weighting.base import Weighting


class Uniform(Weighting):
    """Weight 1 for every client."""

    def weight(self, client: Profile) -> float:
        return 1.0
