"""Ray's metrics of a run: counters and gauges that Ray exports to Prometheus, for `configs/grafana/rayfed.json`.

The driver sets them after every round, each with the tag `run`, the run's name. Ray puts `ray_` before the names, and
`_total` behind those of counters. Where Ray's export is off, the values go nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from rayfed.clients.plan import RunPlan
from rayfed.engine.ray_executor import RayExecutor
from rayfed.server.sampling import RoundCosts
from rayfed.tracking import Record, RunInfo, Sink

COUNTERS: Mapping[str, str] = {
    "rayfed_rounds": "Finished rounds.",
    "rayfed_retries": "Clients that were trained again after their worker died or hung.",
    "rayfed_bytes_down": "Bytes of all messages from the server to clients.",
    "rayfed_bytes_up": "Bytes of all messages from clients to the server.",
}
GAUGES: Mapping[str, str] = {
    "rayfed_clients_per_second": "Clients of the last round by the time of its training.",
    "rayfed_tokens_per_second": "Tokens that these clients trained on, by the same time.",
    "rayfed_worker_idle_share": "Share of the workers' time since the round before in which they had no job; 0 to 1.",
}


class RayMetrics(Sink):
    """Sets the metrics from each round's record and the executor's measured times. ``clock`` gives seconds."""

    def __init__(self, plan: RunPlan, executor: RayExecutor, clock: Callable[[], float] = time.monotonic) -> None:
        self.costs, self.workers = RoundCosts(plan), plan.engine.workers
        self.supervision, self.clock = executor.supervision, clock
        self.counters = {name: Counter(name, text, ("run",)) for name, text in COUNTERS.items()}
        self.gauges = {name: Gauge(name, text, ("run",)) for name, text in GAUGES.items()}
        tags = {"run": plan.name.encode("ascii", "replace").decode()}  # Ray refuses others
        for metric in (*self.counters.values(), *self.gauges.values()):
            metric.set_default_tags(tags)
        self.last = (clock(), self.supervision.busy)

    def start(self, info: RunInfo) -> None:
        self.last = (self.clock(), self.supervision.busy)

    def round(self, record: Record) -> None:
        (then, busy), self.last = self.last, (self.clock(), self.supervision.busy)
        values: Mapping[str, Any] = record
        seconds, costs = values["time/train_s"], self.costs.at(values["round"] - 1)
        counts = {
            "rayfed_rounds": 1,
            "rayfed_retries": values["clients/retried"],
            "rayfed_bytes_down": values["bytes/down"],
            "rayfed_bytes_up": values["bytes/up"],
        }
        levels = {
            "rayfed_clients_per_second": values["clients/ok"] / seconds,
            "rayfed_tokens_per_second": sum(costs[client] for client, _ in values["clients/trained"]) / seconds,
            "rayfed_worker_idle_share": 1 - (self.last[1] - busy) / ((self.last[0] - then) * self.workers),
        }
        for name, count in counts.items():
            if count:  # Ray refuses 0
                self.counters[name].inc(count)
        for name, level in levels.items():
            self.gauges[name].set(float(level))
