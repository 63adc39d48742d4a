"""Two nodes: where workers go, that a lost node costs time and not the result, and a cluster that has yet to grow.

The cluster is one on this machine, by ray.cluster_utils: nodes are processes, and removing one kills all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group

import rayfed
from rayfed.api import prepare
from rayfed.config.execution import Engine
from rayfed.engine.placement import _mistake, bundle_of, reserve, with_shares
from rayfed.errors import UserError

RUN = ("wire.up.density=0.25", "server.rounds=30", "server.cohort=4", "eval.every=30")
ON_RAY = ("engine.kind=ray", "engine.workers=2")
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head, where the driver runs, and one more node; a CPU each. This process leaves any other Ray."""
    ray.shutdown()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": QUICK}
    )
    cluster.add_node(num_cpus=1)
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
    remove_placement_group(group)
    deadline = time.monotonic() + 60  # a removed group's places come back a moment later
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.05)


def test_workers_that_hold_nothing_need_no_group(nodes: Cluster) -> None:
    assert reserve(Engine(workers=2, cpus_per_worker=0)) is None


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
            "engine.workers: got 1 with 2 CPU each, but Ray's nodes have room for 0 of them",
        ),
        (
            Engine(workers=3, gpus_per_worker=0.5),
            [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0}],
            "engine.gpus_per_worker: got 0.5 for each of 3 workers, but Ray has 1 GPUs",
        ),
        (
            Engine(workers=3, gpus_per_worker=0.5),
            [{"CPU": 8.0}, {"CPU": 2.0, "GPU": 2.0}],
            "engine.workers: got 3 with 1 CPU and 0.5 GPU each, but Ray's nodes have room for 2 of them",
        ),
    ],
)
def test_what_never_fits_is_known_by_the_nodes(engine: Engine, room: Any, mistake: str | None) -> None:
    assert _mistake(engine, room) == mistake


@pytest.mark.parametrize(
    ("gpus", "workers", "each"),
    [(1, 1, 1), (1, 2, 0.5), (1, 3, 0.3333), (2, 3, 0.5), (8, 8, 1), (8, 5, 1), (3, 8, 0.3333)],
)
def test_workers_share_the_gpus_there_are(gpus: int, workers: int, each: float) -> None:
    engine = Engine(workers=workers, cpus_per_worker=0).with_gpus(gpus)
    assert engine.gpus_per_worker == each
    assert _mistake(engine, [{"GPU": float(gpus)}]) is None
    assert _mistake(engine, [{"GPU": 1.0}] * gpus) is None


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
    assert with_shares(plan).engine.gpus_per_worker == each
    assert with_shares(plan).digest == plan.digest


@pytest.mark.parametrize(
    ("waits", "says"), [("false", "Ray has no GPUs to share"), ("true", "a number is needed until")]
)
def test_no_gpu_has_no_shares(tiny: Any, monkeypatch: Any, waits: str, says: str) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Labels": {}, "Resources": {"CPU": 4.0}}])
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: None)
    with pytest.raises(UserError, match=rf"^engine.gpus_per_worker: got 'auto', but {says}[^\n]*$"):
        with_shares(prepare(tiny("engine.kind=ray", "engine.device=cuda", f"engine.wait_for_nodes={waits}")))


def test_a_worker_holds_what_the_settings_say() -> None:
    assert bundle_of(Engine(cpus_per_worker=1, gpus_per_worker=0.25)) == {"CPU": 1.0, "GPU": 0.25}
    assert bundle_of(Engine(cpus_per_worker=0)) == {}
