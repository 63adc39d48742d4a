"""What a model still knows of earlier experiences (`partition.sequence`).

With a_{t,j} the accuracy on the test rows of experience j (of its classes, or domains) after experience t, where the
model chooses among all classes that it has seen, and A_t the accuracy on the test rows of all experiences up to t:

    average accuracy    (1/T) sum_t A_t
    forgetting          (1/(T-1)) sum_{j < T} ( max_{j <= t < T} a_{t,j} - a_{T,j} )

Both are the usual figures of class-incremental learning (Chaudhry et al. 2018, arXiv 1801.10112, for forgetting).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayfed.clients.plan import RunPlan
from rayfed.server.evaluation.evaluate import SplitOutputs
from rayfed.tasks.base import Metric

Accuracies = Sequence[Sequence[float | None]]
"""a_{t,j}: row t has the accuracies after experience t, of the experiences up to t."""


def experience_metrics(plan: RunPlan, t: int, outputs: SplitOutputs | None) -> dict[str, Metric]:
    """The accuracy after round ``t`` (from 0) on the test rows of each experience so far; nothing without a sequence.

    Keys: `test/accuracy_experience_1` and so on; None for one without test rows. ``outputs`` are those on the test
    rows of all seen classes; None: there are no test rows.
    """
    experiences, now = plan.federation.experiences, plan.experience(t)
    found: dict[str, Metric] = {}
    if experiences is None or now is None:
        return found
    place = experiences.experience_of("test", plan.federation.test.labels)
    for j in range(now + 1):
        value = None
        if outputs is not None:
            right = (outputs.predictions == outputs.labels).numpy()[place[outputs.rows] == j]
            value = float(right.mean()) if len(right) else None
        found[f"test/accuracy_experience_{j + 1}"] = value
    return found


def forgetting(accuracies: Accuracies) -> float | None:
    """The mean over the earlier experiences of how far each is below its best; None before the second experience."""
    *before, last = accuracies if accuracies else [[]]
    lost = []
    for j, now in enumerate(last[: len(before)]):
        best = [row[j] for row in before[j:]]
        known = [value for value in best if value is not None]
        if now is not None and known:
            lost.append(max(known) - now)
    return float(np.mean(lost)) if lost else None
