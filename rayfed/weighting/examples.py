"""A client counts as much as it has training rows (McMahan et al. 2017, FedAvg)."""

from __future__ import annotations

from rayfed.weighting.base import Weighting


class Examples(Weighting):
    """The weight is the client's number of training rows."""
