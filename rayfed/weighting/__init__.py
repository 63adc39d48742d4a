"""Weightings: how much each client counts in the aggregation. One file per weighting; `server.weights` names it."""

from typing import Any

from rayfed.config.options import make_member
from rayfed.plugins import member_class, member_names
from rayfed.weighting.base import Needs, Weighting

WEIGHTINGS = member_names("rayfed.weighting")


def build(name: str, **options: Any) -> Weighting:
    """The weighting of that name, or at that import path, with these options (the section `weighting`).

    UserError where there is none, for an unknown option, and for a value that an option does not allow.
    """
    return make_member(member_class("rayfed.weighting", name, Weighting, "server.weights"), "weighting", name, options)


__all__ = ["WEIGHTINGS", "Needs", "Weighting", "build"]
