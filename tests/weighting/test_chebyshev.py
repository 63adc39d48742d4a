"""The box of the modified Chebyshev weights, solved exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from rayfed.profiles.profile import Profile
from rayfed.weighting import build
from rayfed.weighting.chebyshev import box

THIRDS = torch.full((3,), 1 / 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("eps", "expected"),
    [(0.1, [1 / 3 - 0.1, 1 / 3 + 0.1, 1 / 3]), (1.0, [0, 1, 0]), (0.0, [1 / 3, 1 / 3, 1 / 3])],
)
def test_by_hand(eps, expected):
    found = box(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64), THIRDS, eps)
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_no_point_of_the_box_is_better():
    """A grid over the simplex of 4 clients, of unequal shares."""
    grid = [p for p in itertools.product(range(21), repeat=4) if sum(p) == 20]
    points = torch.tensor(grid, dtype=torch.float64) / 20
    shares = torch.tensor([0.5, 0.1, 0.15, 0.25], dtype=torch.float64)
    for seed, eps in enumerate((0.0, 0.05, 0.2, 0.6, 1.0)):
        losses = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = box(losses, shares, eps)
        assert float(best.sum()) == pytest.approx(1, abs=1e-12)
        assert bool(((best - shares).abs() <= eps + 1e-12).all())
        inside = points[((points - shares).abs() <= eps + 1e-12).all(1)]
        assert len(inside) == 0 or float(best @ losses) >= float((inside @ losses).max()) - 1e-12


def test_a_client_sends_its_mean_loss_and_eps_0_is_fedavg():
    own = build("chebyshev", eps=0.0)
    assert own.statistics(torch.tensor([1.0, 2.0], dtype=torch.float64)).tolist() == [1.5]
    clients = [Profile(0, 4, examples=30), Profile(1, 4, examples=10)]
    assert own.weights(clients, torch.tensor([[1.0], [9.0]])).tolist() == [0.75, 0.25]
