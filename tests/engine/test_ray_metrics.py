"""Ray's metrics: their values, and that the dashboard in configs/grafana asks for exactly what a run exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import lowrank

from rayfed.api import prepare
from rayfed.clients.messages import FeatureJob
from rayfed.config.execution import Engine
from rayfed.engine import ray_metrics
from rayfed.engine.ray_metrics import COUNTERS, GAUGES, RayMetrics
from rayfed.engine.supervision import Supervision
from rayfed.server.sampling import client_costs

now = [0.0]  # seconds, of the sink's clock
ROOT = Path(__file__).parents[2]


class Metric:
    """Stands for a counter or a gauge of Ray; ``seen`` are the values, with their tags."""

    def __init__(self, name, description, tag_keys):
        assert tag_keys == ("run",)
        self.seen, self.tags = [], {}

    def set_default_tags(self, tags):
        self.tags = tags

    def inc(self, value):
        assert value > 0  # as Ray asks
        self.seen.append(value)

    def set(self, value):
        self.seen.append(value)


@pytest.fixture
def sink(monkeypatch) -> RayMetrics:
    monkeypatch.setattr(ray_metrics, "Counter", Metric)
    monkeypatch.setattr(ray_metrics, "Gauge", Metric)
    plan = prepare(lowrank("name=Größe", "engine.kind=ray", "engine.workers=2"))
    sink = RayMetrics(plan, SimpleNamespace(supervision=Supervision(Engine())), clock=lambda: now[0])
    now[0] = 100.0
    sink.start(None)
    return sink


def test_a_round_sets_every_metric(sink: RayMetrics) -> None:
    now[0] += 10.0
    for seconds in (2.0, 3.0):  # of the 20 s that two workers have in 10 s
        sink.supervision.job_done(FeatureJob("train", 0, 8), seconds)
    record = {
        "round": 7, "clients/ok": 2, "clients/retried": 0, "clients/trained": [[0, 2], [3, 2]], "time/train_s": 4.0,
        "bytes/down": 300, "bytes/up": 70,
    }  # fmt: skip
    sink.round(record)
    now[0] += 1.0
    sink.round({**record, "round": 8, "clients/retried": 3})
    costs = client_costs(prepare(lowrank()).federation, prepare(lowrank()).client)
    assert {name: metric.seen for name, metric in (sink.counters | sink.gauges).items()} == {
        "rayfed_rounds": [1, 1],
        "rayfed_retries": [3],
        "rayfed_bytes_down": [300, 300],
        "rayfed_bytes_up": [70, 70],
        "rayfed_clients_per_second": [0.5, 0.5],
        "rayfed_tokens_per_second": [(costs[0] + costs[3]) / 4] * 2,
        "rayfed_worker_idle_share": [0.75, 1.0],
    }


def test_a_tag_is_ascii_as_ray_asks(sink: RayMetrics) -> None:
    assert sink.gauges["rayfed_worker_idle_share"].tags == {"run": "Gr??e"}


def test_the_dashboard_asks_for_exactly_the_metrics_of_a_run() -> None:
    panels = json.loads((ROOT / "configs/grafana/rayfed.json").read_text(encoding="utf-8"))["panels"]
    asked = {name for panel in panels for query in panel["targets"] for name in re.findall(r"\bray_\w+", query["expr"])}
    assert asked == {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    named = re.findall(r"`(ray_rayfed_\w+)`", (ROOT / "docs/clusters.md").read_text(encoding="utf-8"))
    assert set(named) == asked
    assert all('{run=~"$run"}' in query["expr"] for panel in panels for query in panel["targets"])
