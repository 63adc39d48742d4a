"""rayfed simulates federated LoRA fine-tuning on Ray: sparse communication, unequal ranks, exact byte counts.

    import rayfed

    experiment = rayfed.load_config("configs/quickstart.yaml", ["server.rounds=5"])
    result = rayfed.run(experiment, out="runs/first")

Importing the package is quick: torch and Ray are loaded when they are first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rayfed.api import RunResult, load_config, load_model, prepare, run
    from rayfed.config import Experiment
    from rayfed.errors import UserError
    from rayfed.methods import Method
    from rayfed.objectives import Objective
    from rayfed.tasks.base import Task

_MODULES = {
    "Experiment": "rayfed.config",
    "Method": "rayfed.methods",
    "Objective": "rayfed.objectives",
    "RunResult": "rayfed.api",
    "Task": "rayfed.tasks.base",
    "UserError": "rayfed.errors",
    "load_config": "rayfed.api",
    "load_model": "rayfed.api",
    "prepare": "rayfed.api",
    "run": "rayfed.api",
}
__all__ = [
    "Experiment",
    "Method",
    "Objective",
    "RunResult",
    "Task",
    "UserError",
    "__version__",
    "load_config",
    "load_model",
    "prepare",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rayfed' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
