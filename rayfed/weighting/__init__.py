"""Weightings: how much each client counts in the aggregation. One file per weighting; `server.weights` names it."""

from rayfed.plugins import member_class
from rayfed.weighting.base import Weighting


def build(name: str) -> Weighting:
    """The weighting of that name, or at that import path. UserError where there is none."""
    return member_class("rayfed.weighting", name, Weighting, "server.weights")()


__all__ = ["Weighting", "build"]
