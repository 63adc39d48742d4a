"""The axes of a run, resolved: method, aggregation weights, server optimizer, schedules.

Combinations that make no sense are refused. Every `auto` in the settings becomes what the method's paper uses, here
and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rayfed.config import Experiment
from rayfed.config.training import Schedule
from rayfed.errors import UserError
from rayfed.methods import Method, build
from rayfed.profiles.client_profiles import mixed, sparse
from rayfed.server.optimizers import ServerOptimizer


@dataclass(frozen=True)
class Axes:
    """What the settings come to."""

    method: Method
    weights: str  # "uniform" or "examples"
    optimizer: ServerOptimizer


def resolve(experiment: Experiment) -> Axes:
    """Builds the method and what goes with it; UserError where they do not go together."""
    method = build(experiment.method.name, **experiment.method.options)
    server = experiment.server
    kind = method.optimizer if server.optimizer == "auto" else server.optimizer
    if kind not in method.optimizers:
        raise UserError(
            f"server.optimizer: got {kind!r}, but {experiment.method.name} allows {', '.join(method.optimizers)}"
        )
    weights = method.weights if server.weights == "auto" else server.weights
    if experiment.lora.train == "head" and getattr(method, "train", "all") == "masked":
        raise UserError("method.train: got 'masked', but lora.train=head already says what trains")
    if mixed(experiment) and not method.mixed_ranks:
        raise UserError(
            f"profiles.kind: got {experiment.profiles.kind!r}, which gives clients different ranks, but "
            f"{experiment.method.name} needs all of them at lora.rank={experiment.lora.rank}"
        )
    if not method.sparse_down:
        _must_be_whole(experiment, "down")
    if not method.sparse_up:
        _must_be_whole(experiment, "up")
    return Axes(method, weights, ServerOptimizer(kind, server))


def _must_be_whole(experiment: Experiment, direction: Literal["down", "up"]) -> None:
    """Refuses sparse or rounded messages where the method needs them to arrive as they were sent."""
    wire, name = getattr(experiment.wire, direction), experiment.method.name
    if sparse(experiment, direction):
        raise UserError(f"wire.{direction}.density: got below 1, but what {name} sends {direction} must arrive whole")
    if wire.values != "fp32":
        raise UserError(
            f"wire.{direction}.values: got {wire.values!r}, but what {name} sends {direction} must arrive exactly: fp32"
        )


def rate(lr: float, schedule: Schedule, t: int, rounds: int) -> float:
    """The learning rate of round ``t`` (from 0) of ``rounds``: linear warm-up, then the schedule's shape."""
    if t < schedule.warmup:
        return lr * (t + 1) / schedule.warmup
    span = max(rounds - 1 - schedule.warmup, 1)
    progress = min((t - schedule.warmup) / span, 1.0)
    final = schedule.final
    factor = {
        "constant": 1.0,
        "linear": 1 - (1 - final) * progress,
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2,
        "exponential": final**progress,
    }[schedule.kind]
    return lr * factor
