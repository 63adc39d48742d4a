"""Proximal operators: each value minimises its definition, by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayfed.topologies._proximal import group_l2, l1, mcp

ALPHA, WEIGHT, THETA = 0.4, 0.5, 1.5
GRID = np.linspace(-3, 3, 120_001)
VALUES = torch.tensor([[-2.0, -0.74, -0.2, 0.0], [0.1, 0.3, 0.76, 2.9]], dtype=torch.float64)
ALL = torch.arange(4)


def mcp_penalty(u: np.ndarray) -> np.ndarray:
    inside = WEIGHT * np.abs(u) - u**2 / (2 * THETA)
    return np.where(np.abs(u) <= WEIGHT * THETA, inside, WEIGHT**2 * THETA / 2)


@pytest.mark.parametrize(
    ("found", "penalty"),
    [
        (l1(VALUES, ALPHA * WEIGHT, ALL), lambda u: WEIGHT * np.abs(u)),
        (mcp(VALUES, ALPHA, WEIGHT, THETA, ALL), mcp_penalty),
    ],
    ids=["l1", "mcp"],
)
def test_it_is_the_minimiser(found: torch.Tensor, penalty) -> None:
    for value, own in zip(VALUES.ravel().tolist(), found.ravel().tolist(), strict=True):
        best = GRID[np.argmin(penalty(GRID) + (GRID - value) ** 2 / (2 * ALPHA))]
        assert own == pytest.approx(best, abs=1e-4)


def test_a_group_is_shrunk_in_its_direction_or_is_zero() -> None:
    v = torch.tensor([[3.0, 4.0, 0.1, 0.1, 7.0, 0.0]], dtype=torch.float64)
    shrunk = group_l2(v, 0.5, torch.tensor([0, 0, 1, 1, -1, 2]))
    torch.testing.assert_close(shrunk, torch.tensor([[2.7, 3.6, 0.0, 0.0, 7.0, 0.0]], dtype=torch.float64))


def test_entries_without_a_penalty_stay() -> None:
    columns = torch.tensor([-1, 0, -1, 1])
    for found in (l1(VALUES, 0.2, columns), mcp(VALUES, ALPHA, WEIGHT, THETA, columns), group_l2(VALUES, 0.2, columns)):
        assert torch.equal(found[:, ::2], VALUES[:, ::2])
        assert not torch.equal(found[:, 1::2], VALUES[:, 1::2])
    nowhere = torch.full((4,), -1)
    assert torch.equal(group_l2(VALUES, 0.2, nowhere), VALUES)
