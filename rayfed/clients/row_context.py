"""What an objective's loss per row knows of the clients of a pack: their classes, in all their rows and in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayfed.device import to_device
from rayfed.lora.packed.segments import Segments
from rayfed.objectives import RowContext


def class_counts(labels: Sequence[np.ndarray], classes: int, device: torch.device) -> Tensor:
    """(K, classes) float32: how often each class is among the labels (rows,) of each of K clients."""
    counts = np.stack([np.bincount(own, minlength=classes) for own in labels])
    return to_device(torch.from_numpy(counts).float(), device)


def row_context(
    runs: Segments, labels: Tensor, counts: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, RowContext]:
    """(the slot (rows,) of each row of the batch, the context of the batch).

    ``runs`` are the batch's segments by rows, ``labels`` (rows,) its classes, ``counts`` (K, classes) `class_counts`.
    ``targets`` (K, classes, m) are those of an objective that has some.
    """
    slots = torch.tensor(runs.slots).repeat_interleave(torch.tensor(runs.sizes))
    one_hot = labels[:, None] == torch.arange(counts.shape[1], device=labels.device)
    in_batch = runs.pad(one_hot.to(counts.dtype)).sum(1)
    return to_device(slots, labels.device), RowContext(counts, runs.scatter(in_batch, len(counts)), targets)
