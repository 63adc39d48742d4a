"""The low-rank problem's answer is the answer: its optimum, its gap, and what makes its clients differ."""

from __future__ import annotations

import numpy as np
import pytest

from rayfed.tasks.known_answer.problem import gap, make_problem, share

SMALL = {"out": 6, "inner": 5, "rank": 2, "clients": 7, "rows": 9}


def rows_of(problem, client: int) -> tuple[np.ndarray, np.ndarray]:
    own = problem.owner == client
    return problem.features[own], problem.targets[own]


def objective(problem, W: np.ndarray) -> float:
    """F by its definition: the mean over clients of the mean over rows of half the squared error."""
    losses = []
    for k in range(problem.clients):
        X, Y = (array.astype(np.float64) for array in rows_of(problem, k))
        losses.append(0.5 * ((Y - X @ W.T) ** 2).sum(1).mean())
    return float(np.mean(losses))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_gap_is_the_objective_over_its_least_value(shift: float) -> None:
    problem = make_problem(**SMALL, shift=shift, seed=1)
    least = objective(problem, problem.optimum)
    rng = np.random.default_rng(0)
    for scale in (0.0, 1e-3, 1.0):
        W = problem.optimum + scale * rng.normal(size=(6, 5))
        assert gap(problem, W) == pytest.approx(objective(problem, W) - least, abs=1e-12)
        assert gap(problem, W) >= 0
    assert share(problem, np.zeros((6, 5))) == pytest.approx(1)
    assert share(problem, problem.optimum) == 0
    assert share(problem, problem.optimum.astype(np.float32)) < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_has_the_rank_that_was_asked_for(seed: int) -> None:
    S = np.linalg.svd(make_problem(**SMALL, shift=1.0, condition=30, seed=seed).optimum, compute_uv=False)
    assert S[1] > 0.1
    assert S[2] < 1e-6
    assert np.sqrt((S**2).sum()) == pytest.approx(np.sqrt(2), rel=1e-6)


def test_clients_differ_as_asked() -> None:
    problem = make_problem(**SMALL, condition=30, shift=0.5, seed=0)
    bases = []
    for k in range(problem.clients):
        X, Y = (array.astype(np.float64) for array in rows_of(problem, k))
        values, vectors = np.linalg.eigh(X.T @ X / len(X))
        assert values[-1] / values[0] == pytest.approx(30, rel=1e-4)
        assert values.mean() == pytest.approx(1, rel=1e-5)
        bases.append(vectors)
        own = np.linalg.lstsq(X, Y, rcond=None)[0].T
        assert 0.1 < np.linalg.norm(own - problem.optimum) / np.linalg.norm(problem.optimum) < 1
        np.testing.assert_allclose(Y, X @ own.T, atol=1e-5)  # no noise: a client can fit its own rows
    assert abs(bases[0][:, -1] @ bases[1][:, -1]) < 0.99
    agreed = make_problem(**SMALL, condition=30, shift=0.0, seed=0)
    for k in range(agreed.clients):
        X, Y = rows_of(agreed, k)
        np.testing.assert_allclose(Y, X @ agreed.optimum.T, atol=1e-5)


def test_arrays_and_draws() -> None:
    problem = make_problem(**SMALL, seed=3)
    assert problem.features.shape == (63, 5)
    assert problem.targets.shape == (63, 6)
    assert problem.features.dtype == problem.targets.dtype == np.float32
    np.testing.assert_array_equal(problem.owner, np.repeat(np.arange(7), 9))
    again, other = make_problem(**SMALL, seed=3), make_problem(**SMALL, seed=4)
    np.testing.assert_array_equal(again.features, problem.features)
    np.testing.assert_array_equal(again.targets, problem.targets)
    assert not np.allclose(other.features, problem.features)
    fewer = make_problem(**{**SMALL, "clients": 3}, seed=3)  # a client's rows are its own draw
    np.testing.assert_array_equal(fewer.features, problem.features[:27])
