"""Evaluation of a global model, cut into jobs by the data alone, so that the sums do not depend on who did them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.messages import EvalJob, EvalResult, FeatureJob, FeatureResult, Result, SplitName
from rayfed.lora.adapter import Layout
from rayfed.server.evaluation.baselines import FeatureRows
from rayfed.server.executor import Executor, Submission, results
from rayfed.tasks.federation import Federation

BATCHES_PER_JOB = 4  # small enough to share a split among workers, large enough to pay for the trip


def spans(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each job's rows, counted in order of length; a function of the data and the batch size."""
    step = BATCHES_PER_JOB * batch_size
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class SplitSums:
    """Sums over a split: cross-entropy in nats; correct predictions and rows by class, both (classes,) int64."""

    loss: float
    correct: Tensor
    count: Tensor


Slot = tuple[str, SplitName]
"""A model, by the suffix of its metrics' names ("" or "_masked"), and a split."""


@dataclass(frozen=True)
class Evaluation:
    """What is to be measured: tasks for a executor, to be done whenever it suits; what they find is told afterwards."""

    tasks: tuple[Submission, ...] = ()
    slots: tuple[Slot, ...] = ()  # of each task
    asked: tuple[Slot, ...] = ()  # all of them, those of splits without rows too

    @classmethod
    def of(
        cls, executor: Executor, federation: Federation, models: Mapping[str, tuple[Tensor, Layout]],
        splits: Sequence[SplitName], batch_size: int, classes: tuple[int, ...] | None = None,
    ) -> Evaluation:  # fmt: skip
        """Every model on every split; with ``classes``, on the rows of these classes alone.

        ``models`` maps a suffix to a flat vector (n,) and its layout. The vectors reach the workers losslessly and are
        no client traffic.
        """
        tasks: list[Submission] = []
        slots: list[Slot] = []
        for suffix, (vector, layout) in models.items():
            handle = executor.put(wire.encode(vector))
            for split in splits:
                for start, stop in spans(len(getattr(federation, split)), batch_size):
                    tasks.append(Submission(EvalJob(split, start, stop, layout, classes), (handle,)))
                    slots.append((suffix, split))
        return cls(tuple(tasks), tuple(slots), tuple((suffix, split) for suffix in models for split in splits))

    def sums(self, results: Sequence[Result]) -> dict[Slot, SplitSums]:
        """The sums of each model on each split that has rows; ``results`` in the order of the tasks."""
        found: dict[Slot, list[EvalResult]] = {}
        for slot, result in zip(self.slots, results, strict=True):
            found.setdefault(slot, []).append(cast(EvalResult, result))
        return {
            slot: SplitSums(
                sum(r.loss for r in parts),
                torch.stack([r.correct for r in parts]).sum(0),
                torch.stack([r.count for r in parts]).sum(0),
            )
            for slot, parts in found.items()
        }

    def metrics(self, results: Sequence[Result]) -> dict[str, float | None]:
        """Loss (mean cross-entropy, nats) and accuracy (0 to 1) of each model on each split.

        Keys are `eval/loss`, `eval/accuracy` for the validation split and `test/...`; None for a split without rows.
        """
        measured = self.sums(results)
        metrics: dict[str, float | None] = {}
        for suffix, split in self.asked:
            prefix = "eval" if split == "validation" else split
            found = measured.get((suffix, split))
            count = int(found.count.sum()) if found else 0
            metrics[f"{prefix}/loss{suffix}"] = found.loss / count if found and count else None
            metrics[f"{prefix}/accuracy{suffix}"] = int(found.correct.sum()) / count if found and count else None
        return metrics


def features(executor: Executor, federation: Federation, split: SplitName, batch_size: int) -> FeatureRows:
    """The frozen base's features of a split, in the split's own order of rows."""
    tasks = [Submission(FeatureJob(split, *span)) for span in spans(len(getattr(federation, split)), batch_size)]
    found = [cast(FeatureResult, result) for result in results(executor.run(tasks))]
    place = np.argsort(np.argsort(getattr(federation, split).lengths, kind="stable"))  # jobs count by length
    return FeatureRows(torch.cat([r.features for r in found])[place], torch.cat([r.labels for r in found])[place])
