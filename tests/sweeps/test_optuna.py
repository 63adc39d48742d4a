"""What Optuna suggests: the point of its parameters, the spaces of cases, the Pareto front by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FixedTrial

from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.sweeps.optuna_search import choose
from rayfed.sweeps.plan import Point
from rayfed.sweeps.sweep import build_search

SPACES = {
    "client.lr": {"loguniform": [1e-4, 1e-1]},
    "lora.rank": {"choice": [1, 2, 4]},
    "seed": {"grid": [0, 1]},
}
CASES = {
    "1/4": {"method.name": "flasc", "wire.up.density": {"uniform": [0.1, 0.9]}},
    "fedhl": {"method.name": "fedhl", "method.gamma": {"choice": [1.0, 2.0]}},
    "plain": {"method.name": "fedit"},
}


def section(parameters: Any = SPACES, cases: Any = CASES) -> Sweep:
    return Sweep(parameters=parameters, cases=cases, search={"kind": "optuna", "trials": 40, "startup": 5})


def point_of(params: Mapping[str, Any], sweep: Sweep) -> Point:
    """The point for these parameters of Optuna: all of them are asked for, and no others."""
    asked = FixedTrial(dict(params))
    point = choose(asked, sweep)
    assert asked.params == params
    return point


def test_settings_of_a_case_come_with_it_alone() -> None:
    sweep = section()
    params = {"client.lr": 0.0123456789, "lora.rank": 2}
    common = {"client.lr": 0.0123457, "lora.rank": 4}
    sparse = point_of(params | {"case": 0, "case 0: wire.up.density": 0.5}, sweep)
    assert sparse.overrides == {"method.name": "flasc", "wire.up.density": 0.5} | common
    assert sparse.labels == {"case": "1/4", "wire.up.density": 0.5} | common
    hl = point_of(params | {"case": 1, "case 1: method.gamma": 1}, sweep)
    assert hl.overrides == {"method.name": "fedhl", "method.gamma": 2.0} | common
    assert point_of(params | {"case": 2}, sweep).overrides == {"method.name": "fedit"} | common


def test_one_case_is_no_choice() -> None:
    sweep = section(
        {"client.lr": {"uniform": [0.1, 0.2]}}, [{"method.name": "fedit", "lora.alpha": {"choice": [1, 2]}}]
    )
    point = point_of({"client.lr": 0.1, "case 0: lora.alpha": 0}, sweep)
    assert point.labels == {"method.name": "fedit", "lora.alpha": 1, "client.lr": 0.1}


def test_values_of_a_choice_may_be_anything() -> None:
    choices = [{"kind": "same"}, [1, 2], None, "x"]
    sweep = section({"profiles": {"choice": choices}}, None)
    assert [point_of({"profiles": i}, sweep).overrides["profiles"] for i in range(4)] == choices


def test_without_optuna_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rayfed.sweeps.sweep.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^sweep.search.kind: got 'optuna', but it is not installed: pip install -e '"):
        build_search({}, section(), tmp_path)
