"""What is left of a classification in which only some classes are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayfed.device import to_device
from rayfed.tasks.data.federation import Rows


class ClassSubset:
    """A classification in which only some of ``total`` classes count: ``classes``, ascending, are compared."""

    def __init__(self, classes: Sequence[int], total: int, device: torch.device) -> None:
        self.classes = to_device(torch.tensor(classes), device)
        self.places = torch.full((total,), -1)  # on the CPU, as labels are in the data
        self.places[torch.tensor(classes)] = torch.arange(len(classes))
        self.on_device = to_device(self.places, device)

    def outputs(self, outputs: Tensor) -> Tensor:
        """The columns (rows, compared) of the logits (rows, total)."""
        return outputs.index_select(1, self.classes)

    def labels(self, labels: Tensor) -> Tensor:
        """The places (rows,) of labels among the compared classes."""
        return (self.on_device if labels.device == self.on_device.device else self.places)[labels]

    def original(self, predictions: Tensor) -> Tensor:
        """The classes (rows,) that have these places."""
        return self.classes[predictions]

    def rows(self, rows: Rows) -> Rows:
        """The same rows, labelled by the places of their classes; -1 for rows of other classes."""
        return _Relabelled(rows, self)


class _Relabelled:
    """`Rows` with the labels of a subset."""

    def __init__(self, rows: Rows, subset: ClassSubset) -> None:
        self._rows, self._subset = rows, subset
        self.labels = subset.places.numpy()[rows.labels]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> np.ndarray:
        return self._rows.lengths

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, Tensor]:
        batch = self._rows.batch(rows, padded)
        return {**batch, "labels": self._subset.labels(batch["labels"])}
