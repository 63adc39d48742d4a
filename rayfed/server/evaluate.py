"""Evaluation of a global model, cut into jobs by the data alone, so that the sums do not depend on who did them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.jobs import EvalJob, EvalResult, FeatureJob, FeatureResult, SplitName
from rayfed.lora.adapter import Layout
from rayfed.server.control import FeatureRows
from rayfed.server.crew import Crew, Task, in_order
from rayfed.tasks.federation import Federation

BATCHES_PER_JOB = 4  # small enough to share a split among workers, large enough to pay for the trip


def spans(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each job's rows, counted in order of length; a function of the data and the batch size."""
    step = BATCHES_PER_JOB * batch_size
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class Measured:
    """Sums over a split: cross-entropy in nats; correct predictions and rows by class, both (classes,) int64."""

    loss: float
    correct: Tensor
    count: Tensor


def evaluate(
    crew: Crew, federation: Federation, models: Mapping[str, tuple[Tensor, Layout]], splits: Sequence[SplitName],
    batch_size: int,
) -> dict[str, float | None]:  # fmt: skip
    """Loss (mean cross-entropy, nats) and accuracy (0 to 1) of each model on each split.

    ``models`` maps a suffix of the metric names ("" or "_masked") to a flat vector (n,) and its layout. Keys are
    `eval/loss`, `eval/accuracy` for the validation split and `test/...`; None for a split without rows.
    """
    measured = measure(crew, federation, models, splits, batch_size)
    metrics: dict[str, float | None] = {}
    for suffix in models:
        for split in splits:
            prefix = "eval" if split == "validation" else split
            found = measured.get((suffix, split))
            count = int(found.count.sum()) if found else 0
            metrics[f"{prefix}/loss{suffix}"] = found.loss / count if found and count else None
            metrics[f"{prefix}/accuracy{suffix}"] = int(found.correct.sum()) / count if found and count else None
    return metrics


def measure(
    crew: Crew, federation: Federation, models: Mapping[str, tuple[Tensor, Layout]], splits: Sequence[SplitName],
    batch_size: int, classes: tuple[int, ...] | None = None,
) -> dict[tuple[str, SplitName], Measured]:  # fmt: skip
    """The sums of each model on each split that has rows; with ``classes``, over the rows of these classes alone.

    The vectors reach the workers losslessly and are no client traffic.
    """
    tasks: list[Task] = []
    slots: list[tuple[str, SplitName]] = []
    for suffix, (vector, layout) in models.items():
        handle = crew.put(wire.encode(vector))
        for split in splits:
            for start, stop in spans(len(getattr(federation, split)), batch_size):
                tasks.append(Task(EvalJob(split, start, stop, layout, classes), (handle,)))
                slots.append((suffix, split))
    sums: dict[tuple[str, SplitName], list[EvalResult]] = {}
    for done in in_order(crew.run(tasks)):
        sums.setdefault(slots[done.index], []).append(cast(EvalResult, done.result))
    return {
        slot: Measured(
            sum(r.loss for r in results),
            torch.stack([r.correct for r in results]).sum(0),
            torch.stack([r.count for r in results]).sum(0),
        )
        for slot, results in sums.items()
    }


def features(crew: Crew, federation: Federation, split: SplitName, batch_size: int) -> FeatureRows:
    """The frozen base's features of a split, in the split's own order of rows."""
    tasks = [Task(FeatureJob(split, *span)) for span in spans(len(getattr(federation, split)), batch_size)]
    results = [cast(FeatureResult, done.result) for done in in_order(crew.run(tasks))]
    place = np.argsort(np.argsort(getattr(federation, split).lengths, kind="stable"))  # jobs count by length
    return FeatureRows(torch.cat([r.features for r in results])[place], torch.cat([r.labels for r in results])[place])
