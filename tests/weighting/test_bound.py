"""The bound under a shift of the data against a brute force over distributions of three points, and its limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rayfed.profiles.profile import Profile
from rayfed.weighting import build

CAP = 2.0  # the squared loss is in [0, 4]


def moments(x, p):
    mean = float(p @ x)
    return torch.tensor([[mean, float(p @ (x - mean) ** 2), 100.0]], dtype=torch.float64)


def simplex(steps: int) -> np.ndarray:
    return np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]) / steps


@pytest.mark.parametrize("rho", [0.05, 0.2, 0.5, 0.9])
def test_no_distribution_nearby_is_outside_the_bounds(rho):
    rng = np.random.default_rng(0)
    for _ in range(10):
        x, p = np.sort(rng.uniform(0, CAP**2, 3)), rng.dirichlet(np.ones(3))
        near = simplex(80)
        near = near[1 - np.sqrt(near * p).sum(1) <= rho**2]
        upper, lower = (float(own) for own in build("bound", rho=rho, cap=CAP).bounds(moments(x, p)))
        assert 0 <= lower <= upper <= CAP**2
        if len(near):
            assert (near @ x).max() <= upper + 1e-9
            assert (near @ x).min() >= lower - 1e-9


def test_the_formula_by_hand():
    m, v, q, M = 1.2, 0.3, 0.04, CAP**2
    C = math.sqrt(q * (2 - q) * (1 - q) ** 2)
    upper, lower = build("bound", rho=0.2, cap=CAP).bounds(torch.tensor([[m, v, 9.0]], dtype=torch.float64))
    assert float(upper) == pytest.approx(m + 2 * C * math.sqrt(v) + q * (2 - q) * (M - m - v / (M - m)), rel=1e-12)
    assert float(lower) == pytest.approx(m - 2 * C * math.sqrt(v) - q * (2 - q) * (m - v / m), rel=1e-12)


def test_limits():
    grid = torch.tensor([[m, v, 50.0] for m in (0.0, 0.5, 2.0, 4.0) for v in (0.0, 1e-12, 0.4)], dtype=torch.float64)
    grid = grid[grid[:, 1] <= grid[:, 0] * (CAP**2 - grid[:, 0])]  # no variable in [0, M] has a larger variance
    upper, lower = build("bound", rho=0.0, cap=CAP).bounds(grid)
    assert upper.tolist() == lower.tolist() == grid[:, 0].tolist()
    gaps = [torch.sub(*build("bound", rho=rho, cap=CAP).bounds(grid)) for rho in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert all(bool((wider >= own - 1e-12).all()) for own, wider in itertools.pairwise(gaps))
    assert bool((gaps[-1] == CAP**2).all())
    exact, finite = (build("bound", rho=0.1, cap=CAP, delta=delta).bounds(grid) for delta in (None, 0.05))
    assert bool((finite[0] >= exact[0]).all() and (finite[1] <= exact[1]).all())


def test_weights_follow_the_gap_or_its_inverse():
    clients = [Profile(0, 4, examples=30), Profile(1, 4, examples=10)]
    steady, shaky = [0.5, 1e-4, 20.0], [0.5, 0.2, 20.0]
    sent = torch.tensor([steady, shaky], dtype=torch.float64)
    gap, inverse = (build("bound", direction=d, cap=CAP).weights(clients, sent) for d in ("gap", "inverse"))
    assert gap[0] < gap[1]
    assert (gap * inverse).tolist() == pytest.approx([float(gap.min())] * 2)
    none = build("bound", rho=0.0, cap=CAP)
    assert none.weights(clients, sent).tolist() == [0.75, 0.25]
    caps = torch.tensor([steady, [2.0, 4.0, 20.0]], dtype=torch.float64)  # half at 0 and half at M
    assert build("bound", rho=0.7, cap=CAP).report(caps) == {"at_caps": 0.5}


def test_a_client_sends_the_moments_of_its_clipped_squared_losses():
    own = build("bound", cap=CAP).statistics(torch.tensor([1.0, 9.0, math.nan], dtype=torch.float64))
    assert own.tolist() == [3.0, 2.0, 3.0]  # of 1, 4 and 4
