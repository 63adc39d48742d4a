"""rayfed simulates federated LoRA fine-tuning on Ray: sparse communication, unequal ranks, exact byte counts.

    import rayfed

    experiment = rayfed.load_config("configs/quickstart.yaml", ["server.rounds=5"])
    result = rayfed.run(experiment, out="runs/first")

Importing the package is quick: torch and Ray are loaded when they are first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayfed.keywords import suggest_keywords
from rayfed.suggestions import nearest

__version__ = "0.1.0"

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rayfed.api import Rounds, RunResult, iter_rounds, load_config, load_model, prepare, pretrain, run
    from rayfed.config import Experiment
    from rayfed.engine.callbacks import Callback
    from rayfed.errors import RunError, UserError
    from rayfed.methods import Method
    from rayfed.objectives import Objective
    from rayfed.reports.run_page import ReportCallback
    from rayfed.sweeps import tune
    from rayfed.sweeps.sweep import SweepResult
    from rayfed.tasks.base import Task
    from rayfed.tasks.causal_lm import CausalLM
    from rayfed.tasks.image_classification import ImageClassification
    from rayfed.tasks.image_multi_label import ImageMultiLabel
    from rayfed.tasks.instruction import InstructionTuning
    from rayfed.tasks.multi_label import MultiLabel
    from rayfed.tasks.regression import Regression
    from rayfed.tasks.text_classification import TextClassification

_MODULES = {
    "CausalLM": "rayfed.tasks.causal_lm",
    "Callback": "rayfed.engine.callbacks",
    "Experiment": "rayfed.config",
    "ImageClassification": "rayfed.tasks.image_classification",
    "ImageMultiLabel": "rayfed.tasks.image_multi_label",
    "InstructionTuning": "rayfed.tasks.instruction",
    "Method": "rayfed.methods",
    "MultiLabel": "rayfed.tasks.multi_label",
    "Objective": "rayfed.objectives",
    "Regression": "rayfed.tasks.regression",
    "ReportCallback": "rayfed.reports.run_page",
    "Rounds": "rayfed.api",
    "RunError": "rayfed.errors",
    "RunResult": "rayfed.api",
    "Task": "rayfed.tasks.base",
    "TextClassification": "rayfed.tasks.text_classification",
    "UserError": "rayfed.errors",
    "iter_rounds": "rayfed.api",
    "load_config": "rayfed.api",
    "load_model": "rayfed.api",
    "prepare": "rayfed.api",
    "pretrain": "rayfed.api",
    "run": "rayfed.api",
    "tune": "rayfed.sweeps.tune",
}
__all__ = [
    "Callback",
    "CausalLM",
    "Experiment",
    "ImageClassification",
    "ImageMultiLabel",
    "InstructionTuning",
    "Method",
    "MultiLabel",
    "Objective",
    "Regression",
    "ReportCallback",
    "Rounds",
    "RunError",
    "RunResult",
    "Task",
    "TextClassification",
    "UserError",
    "__version__",
    "iter_rounds",
    "load_config",
    "load_model",
    "prepare",
    "pretrain",
    "report",
    "run",
    "sweep",
    "tune",
]


@suggest_keywords
def sweep(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, out: str | Path | None = None,
    resume: bool = False,
) -> SweepResult:  # fmt: skip
    """Runs a sweep to its end and writes its `report.html`, as `rayfed sweep` does.

    ``config`` is a YAML file, or a mapping of sections as in such a file, with a section `sweep`. ``overrides`` are
    `key=value`. ``out`` (default `runs/NAME-TIME`) must be empty or absent unless ``resume``. A trial that fails is
    recorded, and the others continue: see the result's `failed`, `rows` and `table`. Raises UserError before anything
    is started where a trial is wrong.
    """
    from rayfed.api.plans import settings_file
    from rayfed.reports.sweep_page import write_sweep_page
    from rayfed.sweeps.sweep import run_sweep

    with settings_file(config) as path:
        result = run_sweep(path, overrides, out, resume)
    write_sweep_page(result.out)
    return result


@suggest_keywords
def report(*folders: str | Path, out: str | Path | None = None, target: float | None = None) -> Path:
    """Writes a page with tables and figures of runs and sweeps, as `rayfed report` does. Returns the page's path.

    ``out`` is the folder of `report.html` and `figures/`: by default that of a single run, or `report` for several.
    ``target`` is the accuracy (or gap), 0 to 1, up to which bytes are counted; by default 95 % of the best. Raises
    UserError where a folder holds no run or a file is damaged.
    """
    from pathlib import Path

    from rayfed.errors import UserError
    from rayfed.reports import read, write_report

    if not folders:
        raise UserError("report: got no folder, but at least one run or sweep directory is needed")
    comparison = read(folders, target)
    return write_report(comparison, Path(out or (folders[0] if len(folders) == 1 else "report")))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        near = nearest(name, __all__)
        hint = f"; did you mean {near!r}?" if near else ""
        raise AttributeError(f"module 'rayfed' has no attribute {name!r}{hint}")
    from importlib import import_module

    module = import_module(_MODULES[name])
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
