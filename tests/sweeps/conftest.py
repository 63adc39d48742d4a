"""Sweeps over the problem with a known answer: trained in milliseconds a round, no model to load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SETTINGS: dict[str, Any] = {
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


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Path]:
    """sweep_file({"parameters": ...}, server={"rounds": 9}) -> a file with that section `sweep` and those settings."""

    def write(sweep: Any, **sections: Any) -> Path:
        settings = dict(SETTINGS)
        for name, value in sections.items():
            settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
        if isinstance(sweep, dict) and "metric" not in sweep:
            sweep = {"metric": "eval/gap", "mode": "min", **sweep}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**settings, "sweep": sweep}, sort_keys=False))
        return path

    return write
