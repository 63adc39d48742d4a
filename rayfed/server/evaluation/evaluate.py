"""Evaluation of models on splits, cut into jobs by the data alone: results do not depend on the workers.

Workers return every row's prediction. The task's metrics are computed once, on the driver, from all rows of a split in
their order, so a metric need not be a sum over shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rayfed import wire
from rayfed.clients.messages import EvalJob, EvalResult, FeatureJob, FeatureResult, SplitName
from rayfed.lora.adapter import Layout
from rayfed.server.executor import Executor, Submission, run_all
from rayfed.tasks.base import Metric, Task
from rayfed.tasks.data.federation import Federation

BATCHES_PER_JOB = 4  # small enough to share a split among workers, large enough to pay for the trip
KEYS = {"train": "train", "validation": "eval", "test": "test"}  # what metric keys of a split start with

Model = tuple[Tensor, Layout]
"""A model: all layers' changes and the head as a flat vector (n,), with its layout."""


@dataclass(frozen=True)
class SplitOutputs:
    """A model's outputs on a split: the sum of losses and its number of terms; predictions and labels, by row."""

    loss: float
    count: float
    predictions: Tensor  # (n, ...)
    labels: Tensor  # (n, ...)
    rows: np.ndarray  # (n,): which rows of the split these are, ascending


def spans(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each job's rows, counted in order of length; a function of the data and the batch size."""
    step = BATCHES_PER_JOB * batch_size
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def evaluate(
    executor: Executor, federation: Federation, models: Mapping[str, Model], splits: Sequence[SplitName],
    batch_size: int, classes: tuple[int, ...] | None = None, rows: Mapping[SplitName, np.ndarray] | None = None,
    seen: tuple[int, ...] | None = None,
) -> dict[tuple[str, SplitName], SplitOutputs]:  # fmt: skip
    """Every model's outputs on every split that has rows; with ``classes``, on the rows of these classes alone.

    With ``rows`` (n,), indices by split, on these rows alone. With ``seen`` models choose among these
    classes (see `RunPlan.seen_classes`), and only rows of these classes are evaluated.

    ``models`` maps a suffix of metric keys to a model. The models reach the workers losslessly and are no client
    traffic.
    """
    jobs: list[tuple[tuple[str, SplitName], Submission]] = []
    classes = seen if classes is None else classes
    for suffix, (vector, layout) in models.items():
        handle = executor.put(wire.encode(vector))
        for split in splits:
            own = None if rows is None else rows[split]
            for span in spans(len(federation.split(split) if own is None else own), batch_size):
                job = EvalJob(split, *span, layout, classes, own, seen)
                jobs.append(((suffix, split), Submission(job, (handle,))))
    parts: dict[tuple[str, SplitName], list[EvalResult]] = {}
    for (key, _), result in zip(jobs, run_all(executor, [job for _, job in jobs]), strict=True):
        parts.setdefault(key, []).append(cast(EvalResult, result))
    return {key: _joined(results) for key, results in parts.items()}


def metrics(
    task: Task, federation: Federation, outputs: Mapping[tuple[str, SplitName], SplitOutputs],
    suffixes: Sequence[str], splits: Sequence[SplitName],
) -> dict[str, Metric]:  # fmt: skip
    """Loss and the task's metrics of each model on each split; None for a split without rows.

    Keys are `eval/loss`, `eval/accuracy` and so on for the validation split, `test/...` for the test split, each
    followed by the model's suffix.
    """
    found: dict[str, Metric] = {}
    for suffix in suffixes:
        for split in splits:
            own = outputs.get((suffix, split))
            values: dict[str, Metric] = dict.fromkeys(("loss", *task.metric_names()))
            if own is not None and own.count:
                values = {"loss": own.loss / own.count, **task.metrics(own.predictions, own.labels, federation)}
            found |= {f"{KEYS[split]}/{name}{suffix}": value for name, value in values.items()}
    return found


def features(executor: Executor, federation: Federation, split: SplitName, batch_size: int) -> tuple[Tensor, Tensor]:
    """The frozen base's features (n, width) of a split and its labels (n,), in the order of the split's rows."""
    rows = federation.split(split)
    submissions = [Submission(FeatureJob(split, *span)) for span in spans(len(rows), batch_size)]
    found = [cast(FeatureResult, result) for result in run_all(executor, submissions)]
    place = np.argsort(np.argsort(rows.lengths, kind="stable"))  # jobs count by length
    return torch.cat([r.features for r in found])[place], torch.cat([r.labels for r in found])[place]


def _joined(results: Sequence[EvalResult]) -> SplitOutputs:
    results = [result for result in results if len(result.rows)] or results[:1]
    order = np.argsort(np.concatenate([r.rows for r in results]), kind="stable")
    return SplitOutputs(
        sum(r.loss for r in results),
        sum(r.count for r in results),
        torch.cat([r.predictions for r in results])[order],
        torch.cat([r.labels for r in results])[order],
        np.sort(np.concatenate([r.rows for r in results])),
    )
