"""Objectives: what a client minimises in addition to its task's loss. One file per objective.

A method names a client's objective in `rayfed.methods.Trainable.objective`."""

from rayfed.objectives.base import Objective
from rayfed.objectives.plain import Plain

__all__ = ["Objective", "Plain"]
