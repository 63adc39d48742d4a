"""Two nodes: where workers go, that a lost node costs time and not the result, and a cluster that has yet to grow.

The cluster is one on this machine, by ray.cluster_utils: nodes are processes, and removing one kills all of them.
"""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from small_runs import lowrank, wait_for

import rayfed
from rayfed.api import prepare
from rayfed.config.execution import Engine
from rayfed.engine.placement import _mistake, bundle_of, reserve, with_gpu_share
from rayfed.engine.supervision import Supervision
from rayfed.engine.worker_pool import WorkerPool
from rayfed.errors import UserError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers get the class below without this module
RUN = ("wire.up.density=0.25", "server.rounds=30", "server.cohort=4", "eval.every=30")
ON_RAY = ("engine.kind=ray", "engine.workers=2")
QUICK = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
    "metrics_report_interval_ms": 500,
}  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head, where the driver runs, and one more node with a label; a CPU each. This process leaves any other Ray."""
    ray.shutdown()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": QUICK}
    )
    cluster.add_node(num_cpus=1, labels={"zone": "b"})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def digests(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of every round of the in-process run."""
    return digests_of(rayfed.run(tiny(*RUN), out=tmp_path_factory.mktemp("local") / "run"))


def digests_of(result: rayfed.RunResult) -> list[Any]:
    return [record["state/digest"] for record in result.metrics]


class Watch:
    """A sink that does something at a round or an event, and remembers the events."""

    def __init__(self, at: int | None, act: Callable[[], object]) -> None:
        self.at, self.act, self.events = at, act, []

    def start(self, info: Any) -> None:
        pass

    def round(self, record: Any) -> None:
        if record["round"] == self.at:
            self.act()

    def event(self, text: str) -> None:
        self.events.append(text)
        if self.at is None:
            self.act()

    def finish(self, summary: Any, table: Any) -> None:
        pass

    def close(self) -> None:
        pass


def nodes_of_bundles() -> list[str]:
    """Of the placement groups that are there now."""
    tables = [table for table in placement_group_table().values() if table["state"] == "CREATED"]
    return [node for table in tables for node in table["bundles_to_node_id"].values()]


@pytest.mark.parametrize(("placement", "used"), [("spread", 2), ("pack", 1)])
def test_workers_go_where_the_setting_says(nodes: Cluster, placement: str, used: int) -> None:
    group = reserve(Engine(workers=2, cpus_per_worker=0.5, placement=placement))
    assert group is not None
    ray.get(group.ready(), timeout=60)
    assert len(set(nodes_of_bundles())) == used
    give_back(group)


def give_back(group: PlacementGroup) -> None:
    remove_placement_group(group)
    deadline = time.monotonic() + 60  # a removed group's places come back a moment later
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.05)


def test_workers_go_to_nodes_with_the_labels(nodes: Cluster) -> None:
    (labelled,) = [node["NodeID"] for node in ray.nodes() if "zone" in node["Labels"]]
    engine = Engine(workers=2, cpus_per_worker=0.4, memory_per_worker=0.1, labels={"zone": "in(b, c)"})
    group = reserve(engine)
    ray.get(group.ready(), timeout=60)
    assert set(nodes_of_bundles()) == {labelled}
    give_back(group)
    for zone, expected in (("b", True), ("!b", False)):
        # A worker that holds nothing needs no group.
        bare = Engine(workers=1, cpus_per_worker=0, memory_per_worker=0, labels={"zone": zone})
        pool = WorkerPool(bare, Here, ray.put(None), reserve(bare), Supervision(bare), "run")
        (start,) = pool.starting.values()
        assert (ray.get(start.worker.node.remote(), timeout=60) == labelled) == expected
        pool.close()


class Here:
    """Stands for a worker that says on which node it runs."""

    def load(self, plan: object) -> None:
        pass

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("engine.labels={zone: a}", "engine.labels: got 'a' for zone, but Ray's nodes have b"),
        (
            "engine.labels={zone: b}",
            "engine.cpus_per_worker: got 1 for each of 2 workers, but Ray's nodes with engine.labels have 1 CPUs",
        ),
        (
            "engine.memory_per_worker=9999",
            r"engine.memory_per_worker: got 9999 for each of 2 workers, but Ray has ",
        ),
    ],
)
def test_labels_and_memory_that_no_node_has_are_refused(
    tiny: Any, tmp_path: Any, nodes: Cluster, setting: str, line: str
) -> None:
    with pytest.raises(UserError) as refusal:
        rayfed.run(tiny(*ON_RAY, setting), out=tmp_path / "run")
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_seen_by_name_and_by_metrics(tmp_path: Any, nodes: Cluster) -> None:
    """The driver runs on the head; Ray's agent there exports its metrics, also without a dashboard."""
    names: list[str] = []
    exported: list[str] = []
    (port,) = [node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == nodes.head_node.node_id]

    def look() -> None:
        names.extend(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))

    def scraped() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            exported[:] = [line for line in page.read().decode().splitlines() if line.startswith("ray_rayfed_")]
        return any(line.startswith("ray_rayfed_rounds_total") and line.endswith(" 3.0") for line in exported)

    settings = lowrank(*ON_RAY, "name=sight", "server.rounds=3")
    with rayfed.iter_rounds(settings, tmp_path / "run") as rounds:
        records = [next(rounds) for _ in range(3)]
        look()
        assert wait_for(scraped, 60), exported  # while the driver waits
    assert sorted(names) == ["rayfed-sight-driver", "rayfed-sight-worker-0", "rayfed-sight-worker-1"]
    assert all('run="sight"' in line for line in exported)
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in exported}
    assert values["ray_rayfed_bytes_up_total"] == sum(record["bytes/up"] for record in records)
    assert values["ray_rayfed_bytes_down_total"] == sum(record["bytes/down"] for record in records)
    assert 0 <= values["ray_rayfed_worker_idle_share"] <= 1


def test_workers_that_hold_nothing_need_no_group(nodes: Cluster) -> None:
    assert reserve(Engine(workers=2, cpus_per_worker=0, memory_per_worker=0)) is None


@pytest.mark.slow
def test_a_lost_node_costs_time_and_not_the_result(tiny: Any, tmp_path: Any, nodes: Cluster, digests: Any) -> None:
    """It takes its worker with it and leaves no room for another: the one that is left does the rest."""
    used: list[str] = []

    def strike() -> None:
        used.extend(nodes_of_bundles())
        (node,) = nodes.worker_nodes
        nodes.remove_node(node, allow_graceful=False)

    watch = Watch(2, strike)
    result = rayfed.run(tiny(*RUN, *ON_RAY), out=tmp_path / "run", sink=watch)
    assert len(set(used)) == 2  # both nodes had a worker
    assert digests_of(result) == digests
    assert sum(record["clients/retried"] for record in result.metrics) > 0
    assert any("the actor's node was terminated" in event and "runs again" in event for event in watch.events)


@pytest.mark.slow
def test_a_cluster_that_has_yet_to_grow(tiny: Any, tmp_path: Any, nodes: Cluster, digests: Any) -> None:
    """Refused, unless the settings say that it will grow; then the run starts when it has."""
    assert nodes.worker_nodes == set(), "runs after the node is lost"
    refusal = "engine.cpus_per_worker: got 1 for each of 2 workers, but Ray has 1 CPUs"
    with pytest.raises(UserError) as refused:
        rayfed.run(tiny(*RUN, *ON_RAY), out=tmp_path / "refused")
    assert str(refused.value) == refusal
    assert not (tmp_path / "refused").exists()
    watch = Watch(None, lambda: nodes.add_node(num_cpus=1))
    result = rayfed.run(tiny(*RUN, *ON_RAY, "engine.wait_for_nodes=true"), out=tmp_path / "run", sink=watch)
    assert watch.events == [f"waiting for nodes: {refusal}"]
    assert digests_of(result) == digests


@pytest.mark.parametrize(
    ("engine", "room", "mistake"),
    [
        (Engine(workers=2, cpus_per_worker=0), [{}], None),
        (Engine(workers=2), [{"CPU": 1.0}, {"CPU": 1.0}], None),
        (Engine(workers=4, gpus_per_worker=0.25), [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 1.0}], None),
        (
            Engine(workers=1, cpus_per_worker=2),
            [{"CPU": 1.0}, {"CPU": 1.0}],
            "engine.workers: got 1 with 2 CPU and 0.25 GiB of memory each, but Ray's nodes have room for 0 of them",
        ),
        (
            Engine(workers=3, gpus_per_worker=0.5),
            [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0}],
            "engine.gpus_per_worker: got 0.5 for each of 3 workers, but Ray has 1 GPUs",
        ),
        (
            Engine(workers=3, memory_per_worker=1.5),
            [{"CPU": 8.0, "memory": 4.0 * 2**30}],
            "engine.memory_per_worker: got 1.5 for each of 3 workers, but Ray has 4 GiB of memory; 0 reserves none",
        ),
        (
            Engine(workers=3, memory_per_worker=1.5),
            [{"CPU": 8.0, "memory": 2.5 * 2**30}] * 2,
            "engine.workers: got 3 with 1 CPU and 1.5 GiB of memory each, but Ray's nodes have room for 2 of them",
        ),
        (
            Engine(workers=3, gpus_per_worker=0.5),
            [{"CPU": 8.0}, {"CPU": 2.0, "GPU": 2.0}],
            "engine.workers: got 3 with 1 CPU and 0.5 GPU and 0.25 GiB of memory each, "
            "but Ray's nodes have room for 2 of them",
        ),
    ],
)
def test_what_never_fits_is_known_by_the_nodes(engine: Engine, room: Any, mistake: str | None) -> None:
    assert _mistake(engine, [{"memory": 2.0**40} | node for node in room]) == mistake


@pytest.mark.parametrize(
    ("gpus", "workers", "each"),
    [(1, 1, 1), (1, 2, 0.5), (1, 3, 0.3333), (2, 3, 0.5), (8, 8, 1), (8, 5, 1), (3, 8, 0.3333)],
)
def test_workers_share_the_gpus_there_are(gpus: int, workers: int, each: float) -> None:
    engine = Engine(workers=workers, cpus_per_worker=0).with_gpus(gpus)
    assert engine.gpus_per_worker == each
    assert _mistake(engine, [{"GPU": float(gpus), "memory": 2.0**40}]) is None
    assert _mistake(engine, [{"GPU": 1.0, "memory": 2.0**40}] * gpus) is None


@pytest.mark.parametrize(
    ("engine", "gpus", "each"),
    [(["device=cuda", "workers=3"], 2, 0.5), (["device=cuda", "gpus_per_worker=0.1"], 2, 0.1), ([], 2, 0)],
)
def test_the_run_gets_the_share_as_a_number(
    tiny: Any, monkeypatch: Any, engine: list[str], gpus: int, each: float
) -> None:
    there, gone = {"CPU": 4.0, "GPU": float(gpus)}, {"GPU": 9.0}
    has = [{"Alive": True, "Labels": {}, "Resources": there}, {"Alive": False, "Labels": {}, "Resources": gone}]
    monkeypatch.setattr("ray.nodes", lambda: has)
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: None)
    plan = prepare(tiny("engine.kind=ray", *(f"engine.{setting}" for setting in engine)))
    assert with_gpu_share(plan).engine.gpus_per_worker == each
    assert with_gpu_share(plan).digest == plan.digest


@pytest.mark.parametrize(
    ("waits", "says"), [("false", "Ray has no GPUs to share"), ("true", "a number is needed until")]
)
def test_no_gpu_has_no_shares(tiny: Any, monkeypatch: Any, waits: str, says: str) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Labels": {}, "Resources": {"CPU": 4.0}}])
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: None)
    with pytest.raises(UserError, match=rf"^engine.gpus_per_worker: got 'auto', but {says}[^\n]*$"):
        with_gpu_share(prepare(tiny("engine.kind=ray", "engine.device=cuda", f"engine.wait_for_nodes={waits}")))


def test_a_worker_holds_what_the_settings_say() -> None:
    assert bundle_of(Engine(cpus_per_worker=1, gpus_per_worker=0.25)) == {"CPU": 1.0, "GPU": 0.25, "memory": 2**28}
    assert bundle_of(Engine(cpus_per_worker=0, memory_per_worker=1.5)) == {"memory": 1.5 * 2**30}
    assert bundle_of(Engine(cpus_per_worker=0, memory_per_worker=0)) == {}
