"""Experiences: groups of classes or of domains that clients meet one after the other.

The words are those of continual learning, as in Avalanche: a sequence of classes is class-incremental, one of domains
is domain-incremental, and each group is one experience. Rows of earlier experiences are gone: there is no replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rayfed import seeding
from rayfed.config.class_sequence import ClassSequence
from rayfed.config.task import Partition
from rayfed.errors import UserError, allowed
from rayfed.tasks.data.partition import partition


@dataclass(frozen=True)
class Experiences:
    """``classes`` has the classes of each experience, ascending; ``loss`` says which of them training compares."""

    classes: tuple[tuple[int, ...], ...]
    loss: Literal["current", "seen"] = "current"
    domains: tuple[tuple[str, ...], ...] = ()
    """The domains of each experience of a sequence of domains; empty for one of classes."""
    of_rows: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    """For domains: each row's experience (n,), by split; -1 for rows of no domain of the training rows."""

    def __len__(self) -> int:
        return len(self.classes)

    def seen(self, experience: int) -> tuple[int, ...]:
        """The classes of the experiences 0 to ``experience``, ascending."""
        return tuple(sorted(c for own in self.classes[: experience + 1] for c in own))

    def compared(self, experience: int) -> tuple[int, ...]:
        """The classes that the training loss of an experience (from 0) compares, ascending."""
        return self.classes[experience] if self.loss == "current" else self.seen(experience)

    def experience_of(self, split: str, labels: np.ndarray) -> np.ndarray:
        """(n,): the experience of each row of the split, whose ``labels`` (n,) are classes; -1 for none."""
        if self.domains:
            return self.of_rows[split]
        places = np.full(1 + max(c for own in self.classes for c in own), -1)
        for j, own in enumerate(self.classes):
            places[list(own)] = j
        return places[labels]

    @classmethod
    def of(cls, classes: int, settings: ClassSequence, seed: int) -> Experiences:
        """So many classes in their order (keyed by ``seed``, purpose "sequence.order"), cut into nearly equal groups.

        UserError where there are fewer classes than experiences, or where the loss would compare a class with nothing.
        """
        count = settings.experiences
        if count > classes:
            raise allowed("partition.sequence.experiences", count, f"there are only {classes} classes")
        if count > 1 and 2 * count > classes and settings.loss == "current":
            what = (
                f"of {classes} classes some experiences have one alone, and its cross-entropy is 0 whatever the model; "
                f"at most {classes // 2} are allowed with loss=current"
            )
            raise allowed("partition.sequence.experiences", count, what)
        order = np.arange(classes)
        if settings.order == "shuffled":
            order = seeding.numpy_rng(seed, "sequence.order").permutation(classes)
        return cls(tuple(tuple(sorted(own.tolist())) for own in np.array_split(order, count)), settings.loss)


def divide(
    strata: np.ndarray, owners: Mapping[str, np.ndarray | None], classes: int, settings: Partition, seed: int
) -> tuple[list[np.ndarray], Experiences | None]:
    """Each client's rows, as `partition` gives them, and the experiences of a `partition.sequence`.

    ``strata`` (n,) are the classes of the training rows. ``owners`` are those of `data.client`, by split. With a
    sequence every experience's rows are divided for themselves, by draws of their own. Where clients have names or
    domains, one partition of all rows gives every client its rows in each experience. UserError as in `partition`.
    """
    if settings.sequence is None:
        return partition(strata, owners["train"], settings, seed), None
    if settings.sequence.of == "domains":
        experiences = _of_domains(strata, owners, settings.sequence, seed)
    else:
        experiences = Experiences.of(classes, settings.sequence, seed)
    if len(experiences) == 1 or settings.column:
        return partition(strata, owners["train"], settings, seed), experiences
    place = experiences.experience_of("train", strata)
    each = [_part(strata, np.flatnonzero(place == j), settings, seed, j) for j in range(len(experiences))]
    return [np.sort(np.concatenate(of_client)) for of_client in zip(*each, strict=True)], experiences


def _of_domains(
    strata: np.ndarray, owners: Mapping[str, np.ndarray | None], settings: ClassSequence, seed: int
) -> Experiences:
    """The domains in their order (keyed by ``seed``, purpose "sequence.order"), cut into nearly equal groups.

    UserError where rows have no domain, where there are too few, or where the loss would compare a class with nothing.
    """
    own = owners["train"]
    if own is None or owners["test"] is None:
        which = "train" if own is None else "test"
        what = f"with partition.sequence.of=domains the {which} rows need a column that names their domain"
        raise allowed("data.client", None, what)
    names, count = np.unique(own), settings.experiences
    if count > len(names):
        raise allowed("partition.sequence.experiences", count, f"there are only {len(names)} domains")
    if settings.order == "shuffled":
        names = seeding.numpy_rng(seed, "sequence.order").permutation(names)
    groups = tuple(tuple(sorted(part.tolist())) for part in np.array_split(names, count))
    place = {name: j for j, group in enumerate(groups) for name in group}
    of_rows = {
        split: np.array([] if found is None else [place.get(name, -1) for name in found.tolist()], dtype=np.int64)
        for split, found in owners.items()
    }
    classes = tuple(tuple(np.unique(strata[of_rows["train"] == j]).tolist()) for j in range(count))
    alone = [j for j, found in enumerate(classes, 1) if len(found) == 1]
    if count > 1 and alone and settings.loss == "current":
        what = f"experience {alone[0]} has rows of one class alone, and its cross-entropy is 0; loss=seen is allowed"
        raise allowed("partition.sequence.experiences", count, what)
    return Experiences(classes, settings.loss, groups, of_rows)


def _part(strata: np.ndarray, rows: np.ndarray, settings: Partition, seed: int, experience: int) -> list[np.ndarray]:
    """Each client's part of these rows, dealt out by draws of the experience's own."""
    own = seeding.derive_seed(seed, "sequence.partition", experience)
    try:
        return [rows[part] for part in partition(strata[rows], None, settings, own)]
    except UserError as error:
        raise UserError(f"{error} (in experience {experience + 1} of partition.sequence)") from None
