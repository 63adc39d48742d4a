"""What tests that start whole runs share: the smallest settings there are, and waiting for an event of a run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from rayfed.config import Experiment, validate
from rayfed.config.load import _apply  # the same path an override takes
from rayfed.config.task import Data, Model, Partition
from rayfed.tasks.text_classification import TextClassification

LOWRANK: dict[str, Any] = {  # the problem with a known answer: milliseconds a round, no model to load
    "name": "tiny",
    "data": {"source": "lowrank"},
    "problem": {"outputs": 6, "inputs": 6, "true_rank": 3, "rows": 8},
    "partition": {"kind": "natural", "clients": 6},
    "lora": {"rank": 2, "alpha": 2, "target_modules": ["layer"]},
    "method": {"name": "fedit"},
    "client": {"lr": 0.05, "momentum": 0.0, "batch_size": 8, "steps": 2},
    "server": {"rounds": 4, "cohort": 2},
    "engine": {"kind": "local"},
    "tracking": {"console": "off", "wandb": "off"},
}

CLASSIFICATION = TextClassification(Data(), Partition(), Model(), 0)
"""For the loss and the metrics of classes alone: data and model are not read."""


def lowrank(*overrides: str) -> Experiment:
    """`LOWRANK` with overrides such as "server.rounds=2"."""
    settings = copy.deepcopy(LOWRANK)
    for override in overrides:
        _apply(settings, override)
    return validate(settings)


def wait_for(condition: Callable[[], object], seconds: float = 180) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False
