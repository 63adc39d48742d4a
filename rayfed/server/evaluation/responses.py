"""Evaluation of the responses that the global model writes to prompts (`eval.generate_rows`)."""

from __future__ import annotations

from typing import cast

import numpy as np

from rayfed import wire
from rayfed.clients.messages import GenerateJob, GenerateResult, SplitName
from rayfed.clients.plan import RunPlan
from rayfed.seeding import numpy_rng
from rayfed.server.evaluation.evaluate import KEYS, Model
from rayfed.server.executor import Executor, Submission, run_all
from rayfed.tasks.base import Metric
from rayfed.tasks.data.federation import Prompts

SPLITS: tuple[SplitName, ...] = ("validation", "test")


def response_metrics(plan: RunPlan, model: Model, executor: Executor) -> dict[str, Metric]:
    """`eval/exact_match`, `test/rouge_l` and so on: the task's metrics of responses; nothing for a split without rows.

    The rows are the same in every round. A job has `eval.batch_size` of them, with prompts of about one length.
    """
    task, federation, settings = plan.task, plan.federation, plan.eval
    vector, layout = model
    handle = executor.put(wire.encode(vector))
    chosen: dict[SplitName, np.ndarray] = {}
    jobs: list[Submission] = []
    for split in SPLITS:
        data = cast(Prompts, federation.split(split))
        rows = numpy_rng(plan.seed, "eval.generate_rows", split).permutation(len(data))[: settings.generate_rows]
        rows = rows[np.argsort(data.prompts[rows], kind="stable")]
        if len(rows):
            chosen[split] = rows
            parts = np.split(rows, range(settings.batch_size, len(rows), settings.batch_size))
            jobs += [Submission(GenerateJob(split, p, layout, settings.max_new_tokens), (handle,)) for p in parts]
    results = [cast(GenerateResult, result) for result in run_all(executor, jobs)]
    tokens = iter([row for result in results for row in result.tokens])
    found: dict[str, Metric] = {}
    for split, rows in chosen.items():
        values = task.response_metrics([next(tokens) for _ in rows], federation.split(split), rows)
        found |= {f"{KEYS[split]}/{name}": value for name, value in values.items()}
    return found
