"""Experiences: nearly equal groups of classes in a keyed order, and rows that are divided in each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayfed.config.class_sequence import ClassSequence
from rayfed.config.task import Partition
from rayfed.errors import UserError
from rayfed.tasks.data.class_subset import ClassSubset
from rayfed.tasks.data.experiences import Experiences, divide
from rayfed.tasks.data.federation import Federation, NumberRows
from rayfed.tasks.data.heterogeneity import describe
from rayfed.tasks.data.partition import partition

LABELS = np.repeat(np.arange(10), 30)


def settings(experiences: int, kind: str = "iid", **more: object) -> Partition:
    return Partition(kind=kind, clients=6, sequence=ClassSequence(experiences=experiences), **more)


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_groups_are_nearly_equal_and_hold_every_class_once(count: int) -> None:
    found = Experiences.of(10, ClassSequence(experiences=count, loss="seen"), seed=3)
    assert sorted(c for own in found.classes for c in own) == list(range(10))
    assert {len(own) for own in found.classes} <= {10 // count, -(-10 // count)}
    assert all(list(own) == sorted(own) for own in found.classes)


def test_the_order_is_keyed_or_given() -> None:
    shuffled = ClassSequence(experiences=5)
    one, same, other = (Experiences.of(10, shuffled, seed) for seed in (0, 0, 1))
    assert one == same != other
    given = Experiences.of(10, ClassSequence(experiences=5, order="given"), 0)
    assert given.classes == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


def test_what_is_compared() -> None:
    current, seen = (Experiences(((1, 4), (0, 3), (2,)), loss) for loss in ("current", "seen"))
    assert current.seen(1) == seen.seen(1) == (0, 1, 3, 4)
    assert current.compared(1) == (0, 3)
    assert seen.compared(1) == (0, 1, 3, 4)


def test_more_experiences_than_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"^partition\.sequence\.experiences: got 11, but there are only 10 classes$"):
        divide(LABELS, {"train": None}, 10, settings(11), 0)


def test_a_loss_over_one_class_is_refused() -> None:
    message = (
        r"^partition\.sequence\.experiences: got 6, but of 10 classes .*; at most 5 are allowed with loss=current$"
    )
    with pytest.raises(UserError, match=message):
        divide(LABELS, {"train": None}, 10, settings(6), 0)


@pytest.mark.parametrize("kind", ["iid", "quantity", "dirichlet", "flasc", "pathological", "shards"])
def test_every_row_goes_to_one_client_in_the_experience_of_its_class(kind: str) -> None:
    parts, experiences = divide(LABELS, {"train": None}, 10, settings(3, kind), 0)
    assert experiences is not None
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    rows = NumberRows(np.zeros((len(LABELS), 1)), LABELS)
    federation = Federation.of((rows, rows, rows), tuple("abcdefghij"), parts, None, experiences)
    for classes, own in zip(experiences.classes, federation.by_experience, strict=True):
        assert sorted(own.rows.tolist()) == np.flatnonzero(np.isin(LABELS, classes)).tolist()
        for client in range(6):
            assert set(own.rows_of(client)) == {r for r in federation.rows_of(client) if LABELS[r] in classes}


def test_the_figures_of_the_data_list_the_experiences() -> None:
    parts, experiences = divide(LABELS, {"train": None}, 10, settings(4), 0)
    rows = NumberRows(np.zeros((len(LABELS), 1)), LABELS)
    found = describe(Federation.of((rows, rows, rows), tuple("abcdefghij"), parts, None, experiences))["experiences"]
    assert [own["rows"] for own in found] == [90, 90, 60, 60]
    assert [own["clients_with_rows"] for own in found] == [6] * 4
    assert sorted(name for own in found for name in own["classes"]) == list("abcdefghij")


def test_a_client_has_its_classes_in_each_experience() -> None:
    parts, experiences = divide(LABELS, {"train": None}, 10, settings(2, "pathological", classes=2), 0)
    assert experiences is not None
    for classes in experiences.classes:
        assert all(len(set(LABELS[part]) & set(classes)) <= 2 for part in parts)
        assert max(len(set(LABELS[part]) & set(classes)) for part in parts) == 2


def test_one_experience_is_the_plain_partition() -> None:
    parts, _ = divide(LABELS, {"train": None}, 10, settings(1, "dirichlet"), 5)
    plain = partition(LABELS, None, settings(1, "dirichlet"), 5)
    assert all(np.array_equal(one, other) for one, other in zip(parts, plain, strict=True))


def test_named_clients_keep_their_rows() -> None:
    owners = np.array([f"user{i % 7}" for i in range(len(LABELS))])
    parts, _ = divide(LABELS, {"train": owners}, 10, settings(3, "natural"), 0)
    plain = partition(LABELS, owners, settings(3, "natural"), 0)
    assert all(np.array_equal(one, other) for one, other in zip(parts, plain, strict=True))


def test_too_few_rows_name_the_experience() -> None:
    with pytest.raises(UserError, match=r"^partition\.clients: got 6, .* \(in experience 1 of partition\.sequence\)$"):
        divide(np.arange(10), {"train": None}, 10, settings(5), 0)


def test_a_subset_of_the_classes_is_a_classification_of_its_own() -> None:
    subset = ClassSubset((1, 3, 4), 5, torch.device("cpu"))
    logits, labels = torch.arange(10.0).view(2, 5), torch.tensor([4, 1])
    assert subset.outputs(logits).tolist() == [[1.0, 3.0, 4.0], [6.0, 8.0, 9.0]]
    assert subset.labels(labels).tolist() == [2, 0]
    assert subset.original(subset.outputs(logits).argmax(-1)).tolist() == [4, 4]
    rows = subset.rows(NumberRows(np.zeros((3, 2)), np.array([3, 0, 1])))
    assert rows.labels.tolist() == [1, -1, 0]
    assert rows.batch(np.array([2, 0]), True)["labels"].tolist() == [0, 1]
    assert (len(rows), rows.lengths.tolist()) == (3, [1, 1, 1])
