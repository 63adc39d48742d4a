"""Points from Optuna: equal values give equal points; conditional settings; the Pareto front by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.sweeps.optuna_search import Study, pareto_front
from rayfed.sweeps.space import Point

SPACES = {
    "client.lr": {"loguniform": [1e-4, 1e-1]},
    "lora.rank": {"choice": [1, 2, 4]},
    "seed": {"grid": [0, 1]},
}
CASES = {
    "sparse": {"method.name": "flasc", "wire.up.density": {"uniform": [0.1, 0.9]}},
    "fedhl": {"method.name": "fedhl", "method.gamma": {"choice": [1.0, 2.0]}},
    "plain": {"method.name": "fedit"},
}


def section(parameters: Any = SPACES, cases: Any = CASES, **search: Any) -> Sweep:
    return Sweep(parameters=parameters, cases=cases, search={"kind": "optuna", "trials": 40, "startup": 5} | search)


def hand(point: Point) -> tuple[float, float]:
    """Replaces a run: best at rate 0.01; the cost grows with the rank."""
    rate, rank = point.overrides["client.lr"], point.overrides["lora.rank"]
    return -abs(rate - 0.01), rank * (1 + point.overrides.get("wire.up.density", 1.0))


def played(sweep: Sweep, batches: int, seed: int = 0, values: Callable = hand, failed: tuple = ()) -> list[Point]:
    assert sweep.search is not None
    study = Study(sweep.search, sweep, seed)
    aims = 2 if sweep.search.against else 1
    for _ in range(batches):
        for own in study.suggest(4):
            if own.number in failed:
                study.add_result(own.number, None)
        for own in study.suggestions[-4:]:
            if own.number not in failed:
                study.add_result(own.number, values(own.point)[:aims])
    return [own.point for own in study.suggestions]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
@pytest.mark.parametrize("against", [None, "bytes/total"])
def test_equal_values_give_equal_points(sampler: str, against: str | None) -> None:
    more = {"sampler": sampler, "against": against} | ({} if sampler == "tpe" else {"startup": 10})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points = played(section(**more), 5)
        assert played(section(**more), 5) == points
        assert played(section(**more), 5, seed=1) != points
        other = played(section(**more), 5, values=lambda point: (-hand(point)[0], 1.0))
    # The first batch does not depend on values.
    same = [a == b for a, b in zip(points, other, strict=True)]
    assert all(same) == (sampler == "random")
    assert all(same[:4])


def test_failed_points_count() -> None:
    assert played(section(), 5, failed=(1, 6)) == played(section(), 5, failed=(1, 6))
    assert played(section(), 5, failed=(1, 6)) != played(section(), 5)


def test_settings_of_a_case_come_with_it_alone() -> None:
    points = played(section(), 10)
    found = {point.labels["case"] for point in points}
    assert found == {"sparse", "fedhl", "plain"}
    for point in points:
        case = point.labels["case"]
        assert point.overrides["method.name"] == CASES[case]["method.name"]
        assert ("wire.up.density" in point.overrides) == (case == "sparse")
        assert ("method.gamma" in point.overrides) == (case == "fedhl")
        assert 1e-4 <= point.overrides["client.lr"] <= 1e-1
        assert point.overrides["lora.rank"] in (1, 2, 4)
        assert "seed" not in point.overrides
        for value in point.overrides.values():
            assert not isinstance(value, float) or value == float(f"{value:.6g}")


def test_a_list_of_cases_is_labelled_by_its_settings() -> None:
    points = played(section(cases=[{"method.name": "fedit"}, {"method.name": "rbla", "lora.alpha": 2.0}]), 3)
    assert {json.dumps({k: v for k, v in point.labels.items() if k not in SPACES}) for point in points} == {
        '{"method.name": "fedit"}',
        '{"method.name": "rbla", "lora.alpha": 2.0}',
    }


def test_values_of_a_choice_may_be_anything() -> None:
    choices = [{"kind": "same"}, [1, 2], None, "x"]
    points = played(section({"profiles": {"choice": choices}}, None), 5, values=lambda point: (0.0,))
    assert all(point.overrides["profiles"] in choices for point in points)


def test_a_repeated_point_names_the_first_one() -> None:
    sweep = section({"lora.rank": {"choice": [1, 2, 4]}}, None)
    assert sweep.search is not None
    study = Study(sweep.search, sweep, 0)
    first: dict[int, int] = {}
    for own in study.suggest(12):
        rank = own.point.overrides["lora.rank"]
        assert own.same_as == first.get(rank)
        first.setdefault(rank, own.number)
    assert [own.number for own in study.suggestions] == list(range(1, 13))


def test_the_front() -> None:
    values = {
        1: (0.5, 10.0),
        2: (0.7, 20.0),
        3: (0.7, 20.0),  # equals both stay
        4: (0.6, 20.0),  # 2 is better for as much
        5: (0.9, 90.0),
        6: (0.9, 91.0),  # 5 is as good for less
        7: (0.4, 9.0),
    }
    assert pareto_front(values, "max") == [1, 2, 3, 5, 7]
    assert pareto_front(values, "min") == [7]
    assert pareto_front({1: (0.5,), 2: (0.7,), 3: (0.7,)}, "max") == [2, 3]
    assert pareto_front({}, "max") == []


def test_without_optuna_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfed.sweeps.optuna_search.find_spec", lambda name: None)
    sweep = section()
    assert sweep.search is not None
    with pytest.raises(UserError, match=r"^sweep.search.kind: got 'optuna', but it is not installed: pip install -e '"):
        Study(sweep.search, sweep, 0)
