"""The task's loss alone: what most papers minimise."""

from __future__ import annotations

from dataclasses import dataclass

from rayfed.objectives.base import Objective


@dataclass(frozen=True)
class Plain(Objective):
    """The task's loss, and nothing else."""
