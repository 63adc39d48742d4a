"""What clients with models of their own reach with them: the means over a sample of clients, the same in every round.

Each model is the one with which its client would start the next round, on all rows of both splits.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from rayfed.clients.messages import SplitName
from rayfed.clients.plan import RunPlan
from rayfed.seeding import numpy_rng
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.evaluate import KEYS, evaluate, metrics
from rayfed.server.executor import Executor
from rayfed.tasks.base import Metric


def own_metrics(plan: RunPlan, state: Any, t: int, executor: Executor) -> dict[str, Metric]:
    """The means over `eval.own_models` clients, after round ``t`` (from 0); None for a split without rows.

    Keys: `eval/loss_own`, `test/loss_own`, `eval/accuracy_own`, `test/accuracy_own` (or the task's metric).
    """
    splits: tuple[SplitName, ...] = ("validation", "test")
    order = numpy_rng(plan.seed, "eval.own_models").permutation(plan.candidates(t))
    downlink = Downlink(plan, state, t + 1, executor)
    sums: dict[str, list[float | None]] = {}
    for client in sorted(order[: plan.eval.own_models].tolist()):
        profile = plan.profiles.profile(client, int(plan.federation.sizes[client]), t)
        model = downlink.of(profile).model()
        downlink.forget(profile)
        outputs = evaluate(executor, plan.federation, {"": model}, splits, plan.eval.batch_size)
        found = metrics(plan.task, plan.federation, outputs, ("",), splits)
        for split in splits:
            for name in ("loss", plan.task.metric):
                if name:
                    value = cast(float | None, found[f"{KEYS[split]}/{name}"])
                    sums.setdefault(f"{KEYS[split]}/{name}_own", []).append(value)
    return {key: None if None in values else float(np.mean(cast(list[float], values))) for key, values in sums.items()}
