"""FedLC's loss and gradient against the formulas in float64, one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from rayfed.objectives import RowContext
from rayfed.objectives.fedlc import FedLC

COUNTS = torch.tensor([[3.0, 1.0, 0.0, 9.0], [0.0, 5.0, 0.0, 0.0], [4.0, 4.0, 4.0, 4.0]])
SLOTS = torch.tensor([0, 0, 2, 0, 1])
LABELS = torch.tensor([3, 1, 2, 0, 1])


def logits():
    return (4 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1))).requires_grad_()


def rows(objective, z, counts=COUNTS, slots=SLOTS):
    return objective.rows(z, LABELS, slots, RowContext(counts, torch.full_like(counts, torch.nan)))


def expected(z, label, counts, tau, everything):
    """(loss, gradient (C,)) of one row."""
    present = [c for c in range(4) if counts[c] and (everything or c != label)]
    if not present:
        return 0.0, torch.zeros(4, dtype=torch.float64)
    s = torch.tensor([float(z[c]) - tau * float(counts[c]) ** -0.25 if counts[c] else -torch.inf for c in range(4)])
    s = s.double()
    weights = s[present].softmax(0)
    gradient = torch.zeros(4, dtype=torch.float64)
    gradient[present] += weights
    gradient[label] -= 1
    return float(s[present].logsumexp(0) - s[label]), gradient


@pytest.mark.parametrize("tau", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("denominator", ["all", "others"])
def test_loss_and_gradient_are_those_of_the_formula(denominator, tau):
    z = logits()
    losses = rows(FedLC(tau, denominator), z)
    losses.sum().backward()
    for row, (slot, label) in enumerate(zip(SLOTS.tolist(), LABELS.tolist())):
        loss, gradient = expected(z[row].detach(), label, COUNTS[slot], tau, denominator == "all")
        assert losses[row].item() == pytest.approx(loss, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(z.grad[row].double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("denominator", ["all", "others"])
def test_a_class_that_the_client_lacks_gets_no_gradient(denominator):
    z = logits()
    rows(FedLC(1.0, denominator), z).sum().backward()
    absent = (COUNTS == 0)[SLOTS]
    assert absent.any()
    assert not z.grad[absent].any()
    assert z.grad[~absent].isfinite().all()


def test_with_equal_counts_it_is_the_cross_entropy():
    z, equal = logits(), torch.full((3, 4), 7.0)
    losses, plain = rows(FedLC(3.0), z, equal), cross_entropy(z, LABELS, reduction="none")
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), z)[0] for loss in (losses, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_client_of_one_class_has_nothing_to_learn():
    z, one = logits(), torch.zeros(5, 4).scatter(1, LABELS[:, None], 6.0)
    for denominator in ("all", "others"):
        losses = rows(FedLC(1.0, denominator), z, one, torch.arange(5))
        assert not losses.any()
        assert not torch.autograd.grad(losses.sum(), z)[0].any()
