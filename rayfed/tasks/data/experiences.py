"""Experiences: groups of classes that clients meet one after the other.

The words are those of continual learning, as in Avalanche: a sequence of classes is class-incremental, and each group
of classes is one experience. Rows of the classes of earlier experiences are gone: there is no replay.
"""

from __future__ import annotations

from dataclasses import dataclass
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

    def __len__(self) -> int:
        return len(self.classes)

    def seen(self, experience: int) -> tuple[int, ...]:
        """The classes of the experiences 0 to ``experience``, ascending."""
        return tuple(sorted(c for own in self.classes[: experience + 1] for c in own))

    def compared(self, experience: int) -> tuple[int, ...]:
        """The classes that the training loss of an experience (from 0) compares, ascending."""
        return self.classes[experience] if self.loss == "current" else self.seen(experience)

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
    strata: np.ndarray, owners: np.ndarray | None, classes: int, settings: Partition, seed: int
) -> tuple[list[np.ndarray], Experiences | None]:
    """Each client's rows, as `partition` gives them, and the experiences of a `partition.sequence`.

    With a sequence every experience's rows are divided for themselves, by draws of their own. Where clients have names
    or domains, one partition of all rows gives every client its rows in each experience. UserError as in `partition`.
    """
    if settings.sequence is None:
        return partition(strata, owners, settings, seed), None
    experiences = Experiences.of(classes, settings.sequence, seed)
    if len(experiences) == 1 or settings.column:
        return partition(strata, owners, settings, seed), experiences
    each = [_part(strata, own, settings, seed, i) for i, own in enumerate(experiences.classes)]
    return [np.sort(np.concatenate(of_client)) for of_client in zip(*each, strict=True)], experiences


def _part(
    strata: np.ndarray, classes: tuple[int, ...], settings: Partition, seed: int, experience: int
) -> list[np.ndarray]:
    """Each client's rows of these classes, dealt out by draws of the experience's own."""
    rows = np.flatnonzero(np.isin(strata, classes))
    own = seeding.derive_seed(seed, "sequence.partition", experience)
    try:
        return [rows[part] for part in partition(strata[rows], None, settings, own)]
    except UserError as error:
        raise UserError(f"{error} (in experience {experience + 1} of partition.sequence)") from None
