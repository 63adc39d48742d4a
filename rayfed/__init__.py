"""rayfed simulates federated LoRA fine-tuning on Ray: sparse communication, unequal ranks, exact byte counts.

    import rayfed

    experiment = rayfed.load_config("configs/quickstart.yaml", ["server.rounds=5"])
    result = rayfed.run(experiment, out="runs/first")

Importing the package is quick: torch and Ray are loaded when they are first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Experiment", "RunResult", "UserError", "__version__", "load_config", "load_model", "run"]

if TYPE_CHECKING:
    from rayfed.api import RunResult, load_config, load_model, run
    from rayfed.config import Experiment
    from rayfed.errors import UserError

_HOME = {
    "Experiment": "rayfed.config",
    "RunResult": "rayfed.api",
    "UserError": "rayfed.errors",
    "load_config": "rayfed.api",
    "load_model": "rayfed.api",
    "run": "rayfed.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rayfed' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
