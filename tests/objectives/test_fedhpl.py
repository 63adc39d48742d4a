"""FedHPL's loss and targets, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from rayfed.objectives import ClassStatistics, ClientRound, Message, Received, RowContext
from rayfed.objectives.fedhpl import FedHPL

CLASSES = 4
DRAW = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(9, 5, generator=DRAW), torch.tensor([0, 1, 1, 0, 2, 2, 2, 1, 0])
LOGITS = INPUTS @ torch.randn(5, CLASSES, generator=DRAW)  # of a fixed linear model
PARTS = (slice(0, 4), slice(4, 9))  # of two clients: one of them lacks class 2, and nobody has class 3


def absorbed(objective: FedHPL) -> dict[str, torch.Tensor]:
    numbers = [ClassStatistics.of(LOGITS[own], LABELS[own], CLASSES).numbers(variances=False) for own in PARTS]
    return objective.absorb({}, Received(2, None, numbers), torch.zeros(2), 9)


def known(numbers: torch.Tensor | None) -> ClientRound:
    return ClientRound(torch.zeros(2), torch.ones(2).bool(), torch.ones(2), Message(numbers=numbers))


def context(objective: FedHPL, numbers: torch.Tensor | None) -> RowContext:
    counts, targets = torch.ones(1, CLASSES), objective.targets(known(numbers))
    return RowContext(counts, counts, None if targets is None else targets[None])


def losses(objective: FedHPL, logits: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
    return objective.rows(logits, labels, torch.zeros(len(labels), dtype=torch.int64), context(objective, numbers))


def test_global_logits_are_the_means_of_all_rows_of_a_class() -> None:
    objective = FedHPL()
    numbers = objective.send(absorbed(objective)).numbers
    assert numbers is not None
    assert numbers.shape == (1 + CLASSES + CLASSES * 3,)  # of the classes that somebody has
    found = ClassStatistics.from_numbers(numbers, variances=False)
    assert found.known.tolist() == [True, True, True, False]
    for label in range(3):
        torch.testing.assert_close(found.means[label], LOGITS[label == LABELS].mean(0))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_loss_is_the_equation(temperature: float) -> None:
    objective = FedHPL(weight=0.7, temperature=temperature)
    G = absorbed(objective)["means"]
    found = losses(objective, LOGITS, LABELS, objective.send(absorbed(objective)).numbers)
    for row, (z, y) in enumerate(zip(LOGITS, LABELS.tolist(), strict=True)):
        wanted, own = (G[y] / temperature).softmax(0), (z / temperature).log_softmax(0)
        distillation = kl_div(own, wanted, reduction="sum")
        torch.testing.assert_close(found[row], cross_entropy(z, LABELS[row]) + 0.7 * temperature**2 * distillation)


def test_a_class_that_nobody_has_has_no_second_term() -> None:
    objective, labels = FedHPL(), torch.full((9,), 3)
    found = losses(objective, LOGITS, labels, objective.send(absorbed(objective)).numbers)
    torch.testing.assert_close(found, cross_entropy(LOGITS, labels, reduction="none"))


def test_at_the_target_the_second_term_has_no_gradient() -> None:
    """One client, whose own means are the targets."""
    objective = FedHPL()
    own = ClassStatistics.of(LOGITS, LABELS, CLASSES)
    z = own.means[LABELS].clone().requires_grad_()
    losses(objective, z, LABELS, own.numbers(variances=False)).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, z.detach().softmax(1) - torch.eye(CLASSES)[LABELS], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_targets_or_weight_it_is_the_cross_entropy_to_the_bit(weight: float) -> None:
    objective = FedHPL(weight=weight)
    numbers = None if weight else objective.send(absorbed(objective)).numbers
    found = losses(objective, LOGITS, LABELS, numbers)
    assert torch.equal(found, cross_entropy(LOGITS, LABELS, reduction="none"))
