"""FedGA's loss and gradient against the formulas in float64, one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from rayfed.objectives import RowContext
from rayfed.objectives.fedga import FedGA

CLIENT = torch.tensor([[3.0, 1.0, 0.0, 9.0], [2.0, 5.0, 0.0, 1.0]])
BATCH = torch.tensor([[1.0, 1.0, 0.0, 2.0], [0.0, 2.0, 0.0, 0.0]])
SLOTS = torch.tensor([0, 0, 0, 0, 1, 1])
LABELS = torch.tensor([3, 1, 3, 0, 1, 1])


def logits():
    return (2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(1))).requires_grad_()


@pytest.mark.parametrize(("counts", "counted"), [("batch", BATCH), ("client", CLIENT)], ids=["batch", "client"])
def test_loss_and_gradient_are_those_of_the_formula(counts, counted):
    z = logits()
    losses = FedGA(counts).rows(z, LABELS, SLOTS, RowContext(CLIENT, BATCH))
    losses.sum().backward()
    for row, (slot, y) in enumerate(zip(SLOTS.tolist(), LABELS.tolist())):
        n, p = counted[slot].double(), z[row].detach().double().softmax(0)
        own = torch.arange(4) == y
        targets = own + p * (1 - n / n[y])
        total = targets.sum()
        gradient = torch.where(own, p * total - 1, p * (total - 1 + n / n[y]))
        assert losses[row].item() == pytest.approx(float(-(targets * p.log()).sum()), rel=1e-5)
        torch.testing.assert_close(z.grad[row].double(), gradient, rtol=1e-4, atol=1e-6)
        assert abs(z.grad[row].sum().item()) < 1e-5


def test_with_equal_counts_it_is_the_cross_entropy():
    z, equal = logits(), torch.full((2, 4), 3.0)
    losses = FedGA().rows(z, LABELS, SLOTS, RowContext(CLIENT, equal))
    plain = cross_entropy(z, LABELS, reduction="none")
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), z)[0] for loss in (losses, plain)))
