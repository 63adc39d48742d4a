"""Objectives: what a client minimises besides its task's loss. One file an objective."""

from rayfed.objectives.base import Objective
from rayfed.objectives.plain import Plain

__all__ = ["Objective", "Plain"]
