"""Runs on graphs: against the star, against the algorithm in float64, message by message, client by client."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small_runs import lowrank
from torch import Tensor

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.cli.doctor import describe
from rayfed.clients.messages import EvalJob
from rayfed.clients.trainer import Trainer
from rayfed.config import Experiment
from rayfed.engine.local_executor import LocalExecutor
from rayfed.errors import RunError
from rayfed.seeding import numpy_rng
from rayfed.server import checkpoint as checkpoints
from rayfed.server.chain import verify
from rayfed.topologies import OwnModels, metropolis

ALL = ("server.cohort=6", "server.rounds=5", "client.lr=0.2", "method.name=fed_sb")
GRAPH = (*ALL, "topology.kind=graph")
OWNERS = (  # seven clients that are the nodes of a ring
    "topology.kind=graph", "method.name=ffa_lora", "partition.kind=natural", "data.client=owner", "server.cohort=7",
    "client.steps=2",
)  # fmt: skip
TRACKED = (*GRAPH, "topology.algorithm=depositum", "client.momentum=0.5")


def clients_of(out: Path, experiment: Experiment, back: int = 0) -> dict[int, dict[str, Tensor]]:
    """What each client stores after the last round of a run, or so many rounds before."""
    folder = checkpoints.folders(out / "checkpoints")[back]
    found = checkpoints.read(out, folder, experiment.digest()).clients
    return {client: dict(tensors.items()) for client, tensors in found.items()}


def column(result: rayfed.RunResult, key: str) -> list[float]:
    return [record[key] for record in result.metrics]


def test_on_a_complete_graph_decentralised_fedavg_is_fedavg(tmp_path: Path) -> None:
    own = (*ALL, "method.name=fedit", "server.weights=uniform", "server.rounds=2")
    star = rayfed.run(lowrank(*own), out=tmp_path / "star")
    graph = rayfed.run(lowrank(*own, "topology.kind=graph", "topology.graph=complete"), out=tmp_path / "graph")
    for key in ("eval/gap", "train/loss"):
        assert column(graph, key) == pytest.approx(column(star, key), rel=1e-5)
    assert max(column(graph, "topology/consensus")) < 1e-12
    assert column(graph, "bytes/up") == [5 * size for size in column(star, "bytes/up")]  # to five neighbours each
    events = (graph.out / "events.log").read_text()
    assert "topology.graph=complete: 6 clients, 30 directed edges, spectral gap 1; 6 clients are active" in events
    assert events.count("method.name=fedit: neighbours average B and A one by one") == 1


def test_on_a_complete_graph_depositum_is_gradient_descent_one_round_late(tmp_path: Path) -> None:
    own = ("client.steps=1", "client.momentum=0")
    star = rayfed.run(lowrank(*ALL, *own, "server.weights=uniform", "server.rounds=3"), out=tmp_path / "star")
    tracked = lowrank(*TRACKED, *own, "topology.graph=complete", "server.rounds=4")
    graph = rayfed.run(tracked, out=tmp_path / "graph")
    assert graph.metrics[0]["eval/gap"] == 1
    assert column(graph, "eval/gap")[1:] == pytest.approx(column(star, "eval/gap"), rel=1e-5)


class Exact:
    """The clients of a run with the known answer as an algorithm sees them, in float64: B trains, A is drawn."""

    def __init__(self, plan: rayfed.RunPlan) -> None:
        assert plan.topology is not None
        method, problem = plan.method, plan.federation.extra
        self.settings, self.lr, count = plan.client, plan.client.lr, problem.clients
        adapter = plan.start().layers["layer"]
        self.A, self.scale, self.shape = adapter.A.double().numpy(), adapter.scale, tuple(adapter.B.shape)
        self.X = problem.features.reshape(count, -1, self.A.shape[1]).astype(np.float64)
        self.Y = problem.targets.reshape(count, self.X.shape[1], -1).astype(np.float64)
        self.columns = torch.arange(self.shape[1]).repeat(self.shape[0])
        assert isinstance(method, OwnModels)
        self.W = np.eye(count)
        for client, weights in metropolis(plan.topology.graph.neighbours).items():
            for other, weight in weights.items():
                self.W[client, other], self.W[client, client] = weight, self.W[client, client] - weight

    def exchange(self, values: Tensor) -> Tensor:
        return torch.from_numpy(self.W @ values.numpy())

    def gradients(self, x: Tensor, step: int) -> Tensor:
        B = x.numpy().reshape(-1, *self.shape)
        errors = self.scale * self.X @ (B @ self.A).transpose(0, 2, 1) - self.Y
        found = self.scale * errors.transpose(0, 2, 1) @ (self.X @ self.A.T) / self.X.shape[1]
        return torch.from_numpy(found.reshape(len(B), -1))


def test_a_run_computes_what_the_algorithm_does_in_float64(tmp_path: Path) -> None:
    """Every client has 8 rows and batches of 8, so its gradients are exact."""
    own = ("method.name=ffa_lora", "topology.prox=group_l2", "topology.prox_weight=0.2", "topology.order=mix_prox")
    experiment = lowrank(*TRACKED, *own)
    plan = prepare(experiment)
    rayfed.run(experiment, out=tmp_path / "run")
    network = Exact(plan)
    assert plan.topology is not None
    size = network.shape[0] * network.shape[1]
    expected = {name: torch.zeros(6, size, dtype=torch.float64) for name in ("x", "y", "nu", "g")}
    for _ in range(5):
        expected = dict(plan.topology.algorithm.round(expected, network))
    found = clients_of(tmp_path / "run", experiment)
    for name, values in expected.items():
        own_values = torch.stack([found[client][name] for client in range(6)])
        assert float(values.abs().max()) > 1e-3
        torch.testing.assert_close(own_values.double(), values, atol=1e-6, rtol=1e-5)
    zeros = torch.stack([found[client]["x"] for client in range(6)]).view(6, *network.shape) == 0
    assert torch.equal(expected["x"].view_as(zeros) == 0, zeros)
    assert 0 < int(zeros.all(1).sum()) < 6 * network.shape[1]  # columns of B that are 0: ranks that are not selected


def test_clients_that_skip_a_round_stay_as_they_are_and_the_mean_is_kept(tmp_path: Path) -> None:
    """Messages are rounded besides: the invariant of the gradient tracking holds all the same."""
    experiment = lowrank(*TRACKED, "server.cohort=3", "wire.up.values=int8", "checkpoint.keep=9")
    result = rayfed.run(experiment, out=tmp_path / "run")
    now, before = clients_of(result.out, experiment), clients_of(result.out, experiment, back=1)
    active = {client for client, _ in result.metrics[-1]["clients/trained"]}
    assert len(active) == 3
    assert {c for c in now if any(not torch.equal(now[c][name], before[c][name]) for name in now[c])} == active
    y, g = (torch.stack([now[c][name] for c in range(6)]).mean(0) for name in ("y", "g"))
    assert float(g.abs().max()) > 1e-2
    torch.testing.assert_close(y, g, atol=1e-6, rtol=1e-5)
    x = torch.stack([now[c]["x"] for c in range(6)]).double()
    consensus = (x - x.mean(0)).square().sum() / x.mean(0).square().sum() / 6
    assert result.metrics[-1]["topology/consensus"] == pytest.approx(float(consensus), rel=1e-9)


def test_the_ledger_has_every_message_at_both_ends_of_its_edge(tmp_path: Path) -> None:
    experiment = lowrank(*TRACKED, "topology.graph=torus", "partition.clients=9", "server.cohort=9", "server.rounds=2")
    result = rayfed.run(experiment, out=tmp_path / "run")
    topology = prepare(experiment).topology
    assert topology is not None
    table = pq.read_table(result.out / "ledger.parquet").to_pandas()
    size = wire.HEADER_BYTES + 4 * 2 * 2  # a core of rank 2
    assert len(table) == 2 * 2 * 2 * topology.graph.edges  # rounds, exchanges (x and y), ends
    assert set(table.bytes) == {size}
    assert result.metrics[-1]["bytes/total"] == len(table) * size == result.summary["bytes/dense"]
    sent, received = (table[table.direction == way] for way in ("up", "down"))
    for client, others in topology.graph.neighbours.items():
        assert (sent.client == client).sum() == (received.client == client).sum() == 4 * len(others)
        for checksum in set(sent[(sent.client == client) & (sent["round"] == 2)].checksum):
            assert sorted(received[received.checksum == checksum].client) == list(others)
    assert "rounds 1 to 2" in verify(result.out, experiment.digest())
    facts = dict(describe(prepare(experiment)))  # what `rayfed run --dry-run` says
    sent_bytes = len(table) * size // 2
    what = f"2 message(s) of {size / 1e6:.3g} MB on each of 36 directed edges"
    assert facts["a round sends"] == f"at most {sent_bytes / 2 / 1e6:.3g} MB: {what}"
    card = (result.out / "adapter" / "README.md").read_text()
    assert f"| topology | torus, depositum; no server |\n| bytes between clients | {sent_bytes:,} |" in card


def test_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    experiment = lowrank(*TRACKED, "checkpoint.keep=10", "server.cohort=4", "server.rounds=3")
    whole = rayfed.run(experiment, out=tmp_path / "whole")
    out = tmp_path / "cut"
    shutil.copytree(whole.out, out)
    for path in checkpoints.folders(out / "checkpoints")[:-1]:
        shutil.rmtree(path)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:1]))
    resumed = rayfed.run(experiment, out=out, resume=True)
    assert column(resumed, "state/chain") == column(whole, "state/chain")
    assert len(set(column(whole, "state/digest"))) == 3
    assert pq.read_table(out / "ledger.parquet").equals(pq.read_table(whole.out / "ledger.parquet"))


def test_packs_equal_solo_clients_in_any_order_of_arrival(tiny, tmp_path: Path, monkeypatch) -> None:
    experiment, run = tiny(*OWNERS, "topology.algorithm=depositum", "lora.dropout=0.1"), LocalExecutor.run
    alone, three = experiment.with_("engine.pack=1"), experiment.with_("engine.pack=3")
    rayfed.run(alone, out=tmp_path / "alone")
    packs = rayfed.run(three, out=tmp_path / "packs")
    monkeypatch.setattr(LocalExecutor, "run", lambda self, jobs: reversed([*run(self, jobs)]))
    reordered = rayfed.run(three, out=tmp_path / "late")
    assert column(reordered, "state/chain") == column(packs, "state/chain")
    solo = clients_of(tmp_path / "alone", alone)
    for client, vectors in clients_of(packs.out, three).items():
        for name, values in vectors.items():
            torch.testing.assert_close(values, solo[client][name], atol=2e-6, rtol=1e-4)


def test_the_mean_model_and_own_models_are_measured_and_the_mean_is_exported(tiny, tmp_path: Path) -> None:
    experiment = tiny(*OWNERS, "client.lr=0.2", "eval.own_models=1", "eval.clients=true")
    result, plan = rayfed.run(experiment, out=tmp_path / "run"), prepare(experiment)
    clients, layout, last = clients_of(result.out, experiment), plan.start().layout, result.metrics[-1]
    trains = layout.mask("B", "head")
    (drawn,) = numpy_rng(0, "eval.own_models").permutation(plan.candidates(0))[:1].tolist()
    mean = torch.stack([own["x"] for own in clients.values()]).mean(0)
    job, trainer = EvalJob("test", 0, len(plan.federation.test), layout), Trainer(plan)
    for x, suffix in ((mean, ""), (clients[drawn]["x"], "_own")):
        found = trainer.execute(job, [wire.encode(plan.start().flatten().masked_scatter(trains, x))])
        assert found.loss / found.count == pytest.approx(last[f"test/loss{suffix}"], rel=1e-5)
    assert last["test/loss"] != last["test/loss_own"]
    assert last["eval/accuracy_own"] is not None
    assert len(set(last["test/accuracy_per_client"])) > 1
    exported = load_file(result.out / "adapter" / "adapter_model.safetensors")
    B = torch.cat([exported[name].flatten() for name in sorted(exported) if "lora_B" in name])
    torch.testing.assert_close(B, mean[: len(B)], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_change_no_bit(tiny, tmp_path: Path) -> None:
    experiment = tiny(*OWNERS, "topology.algorithm=depositum", "engine.pack=2", "engine.workers=3")
    here = rayfed.run(experiment, out=tmp_path / "here")
    there = rayfed.run(experiment.with_("engine.kind=ray"), out=tmp_path / "there")
    assert column(here, "state/chain") == column(there, "state/chain")


def test_a_client_that_diverged_keeps_its_model_and_sends_nothing(tmp_path: Path) -> None:
    settings = (*GRAPH, "client.on_divergence=drop", "client.max_change=0.2", "server.rounds=1", "client.steps=3")
    result = rayfed.run(lowrank(*settings), out=tmp_path / "run")
    record, table = result.metrics[0], pq.read_table(result.out / "ledger.parquet").to_pandas()
    sent = {client for client, _ in record["clients/trained"]}
    assert record["clients/ok"] == len(sent) == 6 - record["clients/diverged"]
    assert 0 < len(sent) < 6
    assert set(table.client) <= sent
    clients = clients_of(result.out, lowrank(*settings))
    assert {client for client in clients if clients[client]["x"].any()} == sent


def test_a_run_whose_models_explode_ends_in_one_line(tmp_path: Path) -> None:
    own = ("client.lr=1e+25", "client.max_change=null", "client.steps=1", "wire.up.values=int8")
    with pytest.raises(RunError, match=r"^round \d+, client \d: .*lower client.lr") as ended:
        rayfed.run(lowrank(*TRACKED, *own), out=tmp_path / "run")
    assert "\n" not in str(ended.value)
