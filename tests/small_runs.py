"""What tests that start whole runs share: the smallest settings there are, waiting for an event, comparing two runs."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

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


def assert_same_run(one: Path, two: Path) -> None:
    """Equal files, but for times: records and chain, ledger, newest checkpoint, summary, adapter, settings."""

    def lines(out: Path) -> list[dict[str, Any]]:
        records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in record.items() if not key.startswith("time/")} for record in records]

    assert lines(one) == lines(two)
    assert pq.read_table(one / "ledger.parquet").equals(pq.read_table(two / "ledger.parquet"))
    newest = max(path.name for path in (two / "checkpoints").iterdir())
    for name in (
        f"checkpoints/{newest}/state.safetensors", "summary.json", "config.yaml", "adapter/adapter_model.safetensors",
        "adapter/README.md",
    ):  # fmt: skip
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    (own, other) = (json.loads((out / "checkpoints" / newest / "checkpoint.json").read_text()) for out in (one, two))
    for key in ("experiment", "digest", "chain", "progress", "base_updates", "clients"):
        assert own[key] == other[key]
