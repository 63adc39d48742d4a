"""Objectives: what a client minimises. One file per objective; `objective.name` names it.

A method may add a penalty of its own for each client, see `rayfed.methods.Trainable.objective`."""

from typing import Any

from rayfed.config.options import make_member
from rayfed.objectives._class_statistics import ClassStatistics
from rayfed.objectives._stateful import ClientRound, Message, Received, RunFacts, Stateful
from rayfed.objectives.base import Objective, RowContext
from rayfed.objectives.plain import Plain
from rayfed.plugins import member_class, member_names

OBJECTIVES = member_names("rayfed.objectives")


def build(name: str, **options: Any) -> Objective:
    """The objective of that name, or at the import path `package.module:Class`, with these options.

    UserError for an unknown name or option, for a value that the option does not allow, and for an option that is
    missing.
    """
    return make_member(member_class("rayfed.objectives", name, Objective, "objective.name"), "objective", name, options)


__all__ = [
    "OBJECTIVES", "ClassStatistics", "ClientRound", "Message", "Objective", "Plain", "Received", "RowContext",
    "RunFacts", "Stateful", "build",
]  # fmt: skip
