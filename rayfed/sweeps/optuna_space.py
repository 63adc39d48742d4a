"""What Optuna can suggest: the parameters of a search, the point that they describe, the sampler, the Pareto front."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep
from rayfed.errors import UserError
from rayfed.sweeps.space import CASE, Point, make_point, rounded, split_case

if TYPE_CHECKING:
    import optuna

Values = tuple[float, ...]
"""The metric and, with a second objective, its amount."""


def check_installed() -> None:
    """UserError if Optuna is missing."""
    if find_spec("optuna") is None:
        raise UserError("sweep.search.kind: got 'optuna', but it is not installed: pip install -e '.[optuna]'")


def distributions(sweep: Sweep) -> dict[str, optuna.distributions.BaseDistribution]:
    """The parameters of Optuna: the case if there are several, `parameters`, and every case's own spaces."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    cases = sweep.labelled()
    spaces = {key: space for key, space in sweep.parameters.items() if key != SEED}
    for number, (_, case) in enumerate(cases):
        spaces |= {_name(number, key): space for key, space in split_case(case)[1].items()}
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    if len(cases) > 1:
        found[CASE] = CategoricalDistribution(range(len(cases)))
    for name, space in spaces.items():
        if "choice" in space:
            found[name] = CategoricalDistribution(range(len(space["choice"])))
        else:
            ((kind, (low, high)),) = space.items()
            found[name] = FloatDistribution(low, high, log=kind == "loguniform")
    return found


def point_of(params: Mapping[str, Any], sweep: Sweep) -> Point:
    """The point that Optuna suggests with these parameters."""
    number = params.get(CASE, 0)
    label, case = sweep.labelled()[number] if sweep.labelled() else ("", {})
    fixed, spaces = split_case(case)
    values = {key: _value(params[key], space) for key, space in sweep.parameters.items() if key != SEED}
    values |= {key: _value(params[_name(number, key)], space) for key, space in spaces.items()}
    return make_point(sweep, label, fixed, values)


def _name(case: int, key: str) -> str:
    return f"case {case}: {key}"


def _value(suggested: Any, space: Mapping[str, Any]) -> Any:
    return space["choice"][suggested] if "choice" in space else rounded(suggested)


def pareto_front(values: Mapping[int, Values], mode: str) -> list[int]:
    """The points that no other point dominates; equal points are all in the front.

    The first value is better by ``mode``, the second one if it is smaller.
    """
    sign = -1 if mode == "max" else 1
    costs = {number: (sign * own[0], *own[1:]) for number, own in values.items()}
    return [number for number, own in costs.items() if not any(_dominates(other, own) for other in costs.values())]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def sampler_of(search: OptunaSettings, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler for `sweep.search.sampler`."""
    from optuna import samplers

    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=search.batch, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls `multivariate` experimental
        return samplers.TPESampler(n_startup_trials=search.startup, multivariate=True, constant_liar=True, seed=seed)
