"""Points suggested by Optuna (Akiba et al. 2019, arXiv 1907.10902): asked for in batches, told in the order of asking.

The study is in memory and the sampler is seeded by the run's seed, so the same figures give the same points; nothing
else decides them. A batch is asked for as a whole, before any of its figures are known, and told as a whole: which of
its runs ended first cannot matter. (To the parzen estimators a point under way counts as a bad one, so that a batch
spreads out.) What has no finite figures is told as failed.

A space of `parameters` is one of Optuna's, a choice by its index; the label of a case is a choice, and the spaces of a
case are asked for only where it was chosen, under names of their own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rayfed import seeding
from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep, is_space
from rayfed.errors import UserError
from rayfed.sweeps.space import CASE, Point, number

if TYPE_CHECKING:
    import optuna

Figures = tuple[float, ...]
"""The metric and, with a second aim, how much of it."""


@dataclass(frozen=True)
class Suggestion:
    """Point ``number`` (from 1) of the search. ``same`` is that of an earlier point with the same settings, if any."""

    number: int
    point: Point
    same: int | None


class Study:
    """What was asked for and told so far. UserError where Optuna is not installed."""

    def __init__(self, search: OptunaSettings, sweep: Sweep, seed: int) -> None:
        check_installed()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep = sweep
        self.asked: list[Suggestion] = []
        self._trials: list[optuna.Trial] = []
        self._first: dict[str, int] = {}  # settings -> the number of the point that had them first
        less, more = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
        directions = [more if sweep.mode == "max" else less, *([less] if search.against else [])]
        key = seeding.derive_seed(seed, "sweep.optuna") % 2**32
        self._study = optuna.create_study(directions=directions, sampler=_sampler(search, key))

    def ask(self, count: int) -> list[Suggestion]:
        """The next ``count`` points."""
        for _ in range(count):
            trial = self._study.ask()
            point = suggest(trial, self.sweep)
            own = len(self.asked) + 1
            first = self._first.setdefault(json.dumps(point.overrides, sort_keys=True, default=str), own)
            self._trials.append(trial)
            self.asked.append(Suggestion(own, point, None if first == own else first))
        return self.asked[len(self.asked) - count :]

    def tell(self, number: int, figures: Figures | None) -> None:
        """What point ``number`` came to; None: it failed or diverged."""
        import optuna

        if figures is None:
            self._study.tell(self._trials[number - 1], state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._trials[number - 1], list(figures))


def check_installed() -> None:
    """UserError where Optuna is missing."""
    if find_spec("optuna") is None:
        raise UserError("sweep.search.kind: got 'optuna', but it is not installed: pip install 'rayfed[optuna]'")


def suggest(trial: optuna.Trial, sweep: Sweep) -> Point:
    """The point of the trial: a case, if there are any, then `parameters`, then the case's own spaces."""
    cases = sweep.labelled() or [("", {})]
    label, case = cases[_choose(trial, CASE, len(cases))] if len(cases) > 1 else cases[0]
    chosen = {key: _value(trial, key, space) for key, space in sweep.parameters.items() if key != SEED}
    chosen |= {key: _value(trial, f"{label}: {key}", value) for key, value in case.items() if is_space(value)}
    fixed = {key: value for key, value in case.items() if not is_space(value)}
    shown = ({CASE: label} if isinstance(sweep.cases, dict) else fixed) | chosen
    return Point(fixed | chosen, shown)


def front(figures: Mapping[int, Figures], mode: str) -> list[int]:
    """Those whose first figure (by ``mode``) cannot be bettered without more of the second; equals are all in it."""
    sign = -1 if mode == "max" else 1
    costs = {name: (sign * own[0], *own[1:]) for name, own in figures.items()}
    return [name for name, own in costs.items() if not any(_dominates(other, own) for other in costs.values())]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _value(trial: optuna.Trial, name: str, space: Mapping[str, Any]) -> Any:
    ((kind, values),) = space.items()
    if kind == "choice":
        return values[_choose(trial, name, len(values))]
    return number(trial.suggest_float(name, *values, log=kind == "loguniform"))


def _choose(trial: optuna.Trial, name: str, count: int) -> int:
    return int(trial.suggest_categorical(name, list(range(count))))


def _sampler(search: OptunaSettings, seed: int) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=search.batch, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `multivariate` and `group`, for conditional spaces, are called experimental
        return samplers.TPESampler(
            n_startup_trials=search.startup, multivariate=True, group=True, constant_liar=True, seed=seed
        )
