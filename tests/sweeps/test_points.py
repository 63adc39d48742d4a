"""The points of a sweep: which, in which order, under which names."""

from __future__ import annotations

import math

import pytest

from rayfed.config.sweep import Sweep
from rayfed.sweeps.plan import draw, expand, short_names


def points(seed: int = 0, **section) -> list[dict]:
    return [dict(point.overrides) for point in expand(Sweep(**section), seed)]


def names(sweep: Sweep) -> list[str]:
    return [point.name for point in expand(sweep, 0)]


def test_grids_are_crossed_in_the_order_they_are_written():
    got = points(parameters={"method.name": {"grid": ["a", "b"]}, "seed": {"grid": [0, 1]}})
    assert got == [
        {"method.name": "a", "seed": 0},
        {"method.name": "a", "seed": 1},
        {"method.name": "b", "seed": 0},
        {"method.name": "b", "seed": 1},
    ]


def test_cases_are_crossed_with_the_grid_and_their_own_spaces_stay_inside():
    section = {
        "parameters": {"seed": {"grid": [0, 1]}},
        "cases": [{"method.name": "flasc", "wire.up.density": {"grid": [0.5, 0.25]}}, {"method.name": "fedhl"}],
    }
    got = points(**section)
    assert got[:2] == [
        {"method.name": "flasc", "seed": 0, "wire.up.density": 0.5},
        {"method.name": "flasc", "seed": 0, "wire.up.density": 0.25},
    ]
    assert got[4:] == [{"method.name": "fedhl", "seed": 0}, {"method.name": "fedhl", "seed": 1}]
    assert len(got) == 6


def test_a_label_replaces_the_settings_of_its_case():
    sweep = Sweep(cases={"sparse": {"method.name": "flasc", "wire": {"up": {"density": 0.5}}}, "dense": {}})
    assert [dict(point.labels) for point in expand(sweep, 0)] == [{"case": "sparse"}, {"case": "dense"}]
    assert names(sweep) == ["case=sparse", "case=dense"]


def test_every_point_of_the_grid_gets_the_same_draws():
    rate = {"loguniform": [1e-4, 1e-1]}
    parameters = {"method.name": {"grid": ["a", "b"]}, "client.lr": rate}
    got = points(parameters=parameters, samples=3)
    rates = [point["client.lr"] for point in got]
    assert len(set(rates)) == 3
    assert rates[:3] == rates[3:]
    assert all(1e-4 <= value < 1e-1 for value in rates)
    assert points(parameters=parameters, samples=3) == got
    assert [point["client.lr"] for point in points(parameters={"client.lr": rate}, samples=5)][:3] == rates[:3]
    assert points(seed=1, parameters=parameters, samples=3) != got
    other = points(parameters={"client.lr": rate, "lora.dropout": {"uniform": [0, 0.5]}}, samples=3)
    assert [point["client.lr"] for point in other] == rates[:3]  # whatever else is drawn
    unit = {"uniform": [0, 1]}
    assert draw(unit, "client.lr", 0, 0) != draw(unit, "server.lr", 0, 0)


def test_draws_cover_their_range():
    uniform = [draw({"uniform": [2, 4]}, "x", 0, i) for i in range(400)]
    assert (min(uniform), max(uniform)) == pytest.approx((2, 4), abs=0.05)
    assert sum(uniform) / 400 == pytest.approx(3, abs=0.1)
    logs = [math.log10(draw({"loguniform": [1e-4, 1e-2]}, "x", 0, i)) for i in range(400)]
    assert sum(logs) / 400 == pytest.approx(-3, abs=0.1)
    assert all(float(f"{value:.6g}") == value for value in uniform)
    choices = [draw({"choice": ["a", "b", "c"]}, "x", 0, i) for i in range(300)]
    assert all(80 < choices.count(word) < 120 for word in "abc")


def test_draws_that_coincide_are_one_trial():
    assert sorted(p["x"] for p in points(parameters={"x": {"choice": [1, 2]}}, samples=20)) == [1, 2]


def test_names_are_short_different_and_fit_for_a_folder():
    keys = ["wire.up.density", "wire.down.density", "client.lr", "method.name", "model.name", "server.lr", "seed"]
    assert short_names(keys) == {
        "wire.up.density": "up.density",
        "wire.down.density": "down.density",
        "client.lr": "client.lr",
        "method.name": "method",
        "model.name": "model",
        "server.lr": "server.lr",
        "seed": "seed",
    }
    sweep = Sweep(
        parameters={
            "model.name": {"grid": ["a/b c", "a-b-c"]},
            "profiles.ranks": {"grid": [[2, 4], None]},
            "client.lr": {"grid": [1e-3, 0.00015]},
        }
    )
    made = names(sweep)
    assert made[0].startswith("model=a-b-c,ranks=2-4,lr=0.001-")  # a digest distinguishes it from the next name
    assert "model=a-b-c,ranks=null,lr=0.00015" in made[3]
    assert len(set(made)) == 8
    assert not any(set(name) & set("/ :*") for name in made)
    (long,) = names(Sweep(parameters={"model.name": {"grid": ["x" * 500]}}))
    assert len(long) == 120
