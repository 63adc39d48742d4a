"""Multi-label loss and metrics against torch's module and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayfed.tasks.metrics import multi_label


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 10_000))
def test_metrics_are_scikit_learns(rows: int, labels: int, seed: int) -> None:
    from sklearn.metrics import average_precision_score, f1_score

    draw = np.random.default_rng(seed)
    logits = draw.integers(-3, 4, (rows, labels)) / 2  # few values, so that some are equal
    truth = draw.random((rows, labels)) < draw.random(labels)  # some labels have no row, some all
    found = multi_label.metrics(torch.tensor(logits), torch.tensor(truth))
    assert tuple(found) == multi_label.NAMES
    for average in ("micro", "macro"):
        # As columns of 0 and 1: one column would be read as a binary task, whose F1 is that of the class 1.
        wanted = f1_score(*np.pad((truth, logits > 0), ((0, 0), (0, 0), (0, 1))), average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(wanted if average == "micro" else wanted * (labels + 1) / labels)
    known = truth.any(0)
    if not known.any():
        assert found["map"] is None
    else:
        wanted = np.mean([average_precision_score(truth[:, i], logits[:, i]) for i in np.flatnonzero(known)])
        assert found["map"] == pytest.approx(wanted)


def test_the_loss_is_the_mean_over_rows_and_labels() -> None:
    logits, labels = torch.randn(5, 3, requires_grad=True), torch.rand(5, 3) < 0.5
    sums, counts = multi_label.loss(logits, labels)
    assert (sums.shape, counts.tolist()) == ((5,), [3.0] * 5)
    (found,) = torch.autograd.grad(sums.sum() / counts.sum(), logits)
    wanted = torch.nn.BCEWithLogitsLoss()(logits, labels.float())
    torch.testing.assert_close(sums.sum() / counts.sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, logits)[0])
