"""FedImpro's statistics and samples, by hand."""

from __future__ import annotations

import pytest
import torch

from rayfed.objectives import ClassStatistics, ClientRound, Message, Received
from rayfed.objectives._class_statistics import mean_statistics
from rayfed.objectives.fedimpro import FedImpro

CLASSES, WIDTH = 4, 3
DRAW = torch.Generator().manual_seed(0)
VECTORS, LABELS = torch.randn(11, WIDTH, generator=DRAW), torch.tensor([0, 1, 1, 0, 0, 1, 1, 2, 2, 2, 0])
PARTS = (slice(0, 3), slice(3, 6), slice(6, 11))  # of three clients


def of(rows: slice) -> ClassStatistics:
    return ClassStatistics.of(VECTORS[rows], LABELS[rows], CLASSES)


def known(numbers: torch.Tensor | None) -> ClientRound:
    return ClientRound(torch.zeros(2), torch.ones(2).bool(), torch.ones(2), Message(numbers=numbers))


def absorb(objective: FedImpro, state: dict[str, torch.Tensor], *clients: ClassStatistics) -> dict[str, torch.Tensor]:
    numbers = [own.numbers(variances=True) for own in clients]
    return objective.absorb(state, Received(len(numbers), None, numbers), torch.zeros(2), 9)


def test_statistics_are_those_of_each_class() -> None:
    found = of(slice(None))
    assert found.counts.tolist() == [4, 4, 3, 0]
    for label in range(3):
        own = VECTORS[label == LABELS]
        torch.testing.assert_close(found.means[label], own.mean(0))
        torch.testing.assert_close(found.variances[label], own.var(0, correction=0))
    assert not found.means[3].any()
    assert not found.variances[3].any()


@pytest.mark.parametrize("variances", [True, False])
def test_only_classes_with_rows_travel(variances: bool) -> None:
    found = of(PARTS[0])  # two of four classes
    numbers = found.numbers(variances)
    assert numbers.shape == (1 + CLASSES + (2 if variances else 1) * 2 * WIDTH,)
    again = ClassStatistics.from_numbers(numbers, variances)
    assert torch.equal(again.counts, found.counts)
    assert torch.equal(again.means, found.means)
    assert torch.equal(again.variances, found.variances if variances else torch.zeros(CLASSES, WIDTH))


def test_the_servers_statistics_are_those_of_all_rows_together() -> None:
    state, whole = absorb(FedImpro(), {}, *map(of, PARTS)), of(slice(None))
    torch.testing.assert_close(state["means"], whole.means)
    torch.testing.assert_close(state["variances"], whole.variances)
    assert state["counts"].tolist() == [1, 1, 1, 0]  # how many rows a class has is not sent down


def test_the_plain_mean_is_over_the_clients_that_have_the_class() -> None:
    state, own = absorb(FedImpro(average="uniform"), {}, *map(of, PARTS)), [of(part).means for part in PARTS]
    torch.testing.assert_close(state["means"][0], (own[0][0] + own[1][0] + own[2][0]) / 3)
    torch.testing.assert_close(state["means"][2], own[2][2])


def test_a_class_that_nobody_has_stays_and_nothing_changes_in_place() -> None:
    first = absorb(FedImpro(), {}, of(slice(7, 10)))  # class 2 alone
    before = {name: tensor.clone() for name, tensor in first.items()}
    second = absorb(FedImpro(), first, of(PARTS[0]))
    assert torch.equal(second["means"][2], first["means"][2])
    assert torch.equal(second["variances"][2], first["variances"][2])
    torch.testing.assert_close(second["means"][:2], of(PARTS[0]).means[:2])
    assert second["counts"].tolist() == [1, 1, 1, 0]
    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())


def test_clients_without_rows_know_no_class() -> None:
    nobody = ClassStatistics.of(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64), CLASSES)
    assert mean_statistics(None, [nobody], True) is None
    assert absorb(FedImpro(), {}, nobody) == {}
    state = absorb(FedImpro(), {}, nobody, of(PARTS[0]))
    torch.testing.assert_close(state["means"], of(PARTS[0]).means)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_samples_are_balanced(rows: int) -> None:
    """b // C + 1 of each of the known classes, here 0, 1 and 2."""
    numbers = of(slice(None)).numbers(variances=True)
    features, labels = FedImpro().samples(known(numbers), rows, torch.Generator().manual_seed(1))  # type: ignore[misc]
    assert torch.bincount(labels, minlength=CLASSES).tolist() == [rows // 3 + 1] * 3 + [0]
    assert features.shape == (len(labels), WIDTH)


def test_samples_have_the_mean_and_the_variance() -> None:
    whole = of(slice(None))
    drawn = FedImpro().samples(known(whole.numbers(True)), 60_000, torch.Generator().manual_seed(1))
    assert drawn is not None
    found = ClassStatistics.of(*drawn, CLASSES)
    torch.testing.assert_close(found.means, whole.means, atol=0.03, rtol=0)
    torch.testing.assert_close(found.variances, whole.variances, atol=0, rtol=0.05)


def test_without_variance_a_sample_is_the_mean() -> None:
    whole = of(slice(None))
    still = ClassStatistics(whole.counts, whole.means, torch.zeros_like(whole.variances))
    features, labels = FedImpro().samples(known(still.numbers(True)), 5, torch.Generator())  # type: ignore[misc]
    assert torch.equal(features, whole.means[labels])


def test_without_statistics_or_weight_there_are_no_samples() -> None:
    assert FedImpro().send({}) == Message()
    assert FedImpro().samples(known(None), 5, torch.Generator()) is None
    assert FedImpro(weight=0.0).samples(known(of(PARTS[0]).numbers(True)), 5, torch.Generator()) is None
