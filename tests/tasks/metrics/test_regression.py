"""Mean squared error and Spearman's correlation against torch and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayfed.tasks.metrics import regression


@given(st.integers(2, 30), st.integers(0, 10_000))
def test_spearman_is_scipys(rows: int, seed: int) -> None:
    from scipy.stats import spearmanr

    x, y = np.random.default_rng(seed).integers(0, 6, (2, rows)).astype(np.float32)
    found = regression.spearman(torch.tensor(x), torch.tensor(y))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(x, y).statistic)


def test_the_loss_is_the_mean_squared_error() -> None:
    outputs, targets = torch.randn(5, 1), torch.randn(5)
    sums, counts = regression.loss(outputs, targets)
    torch.testing.assert_close(sums.sum() / counts.sum(), torch.nn.functional.mse_loss(outputs[:, 0], targets))
