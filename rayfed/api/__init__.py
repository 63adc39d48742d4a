"""The Python API: read settings, prepare a plan, run it, load what a run left. docs/python.md shows how it is used."""

from __future__ import annotations

from rayfed.api.models import load_model
from rayfed.api.plans import Components, build_components, check, load_config, prepare
from rayfed.api.pretraining import pretrain
from rayfed.api.runs import Rounds, RunResult, iter_rounds, run

__all__ = [
    "Components",
    "Rounds",
    "RunResult",
    "build_components",
    "check",
    "iter_rounds",
    "load_config",
    "load_model",
    "prepare",
    "pretrain",
    "run",
]
