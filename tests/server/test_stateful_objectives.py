"""Runs under objectives with state: oracles on quadratic losses, bytes, client state, resumes, dropped clients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small_runs import lowrank

import rayfed
from rayfed.api import prepare
from rayfed.server.sampling import cohort_of

OBJECTIVES = {
    "scaffold": ("objective.name=scaffold",),
    "fedbc": ("objective.name=fedbc", "objective.rate=0.5", "objective.gamma=0.01"),
    "fedglomo": ("objective.name=fedglomo",),
}
QUADRATIC = (  # W itself trains, on all rows of a client in each of five steps
    "method.name=full_finetuning", "server.optimizer=fedavg", "client.lr=0.1", "client.steps=5", "problem.shift=1.0",
    "server.weights=uniform",
)  # fmt: skip
HEADER = 31
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def state(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the run's last checkpoint."""
    return load_file(max((out / "checkpoints").iterdir()) / "state.safetensors")


def stored(out: Path) -> dict[int, torch.Tensor]:
    """What each client stored last."""
    folder = max((out / "checkpoints").iterdir())
    rows = json.loads((folder / "checkpoint.json").read_text())["objective_clients"]
    return {
        client: load_file(out / "clients" / str(client) / f"objective-{round:06d}.safetensors")["stored"]
        for client, round, _ in rows
    }


class Quadratics:
    """The clients of a run with `QUADRATIC`, in float64: their losses, cohorts and local steps."""

    def __init__(self, settings) -> None:
        self.plan, self.lr, self.steps = prepare(settings), settings.client.lr, settings.client.steps
        self.W = np.zeros((6, 6))

    def cohort(self, t):
        return [int(client) for client in cohort_of(self.plan, t)]

    def gradient(self, client, W):
        rows = self.plan.federation.rows_of(client)
        X = self.plan.federation.train.features[rows].astype(np.float64)
        Y = self.plan.federation.train.labels[rows].astype(np.float64)
        return (W @ X.T - Y.T) @ X / len(rows)

    def end(self, client, start, shift=0.0, pull=0.0):
        W = start
        for _ in range(self.steps):
            W = W - self.lr * (self.gradient(client, W) + shift + pull * (W - start))
        return W


def trained(out: Path) -> np.ndarray:
    return state(out)["method.W.layer"].double().numpy()


def close(found, wanted, rel=2e-6):
    assert np.linalg.norm(found - wanted) <= rel * np.linalg.norm(wanted)


def test_scaffold_comes_to_the_optimum_where_fedavg_stalls(tmp_path):
    own = (*QUADRATIC, "server.cohort=6", "server.rounds=20", "checkpoint.every=20")
    plain, scaffold = (
        rayfed.run(lowrank(*own, f"objective.name={name}"), out=tmp_path / name).metrics[-1]["eval/gap"]
        for name in ("plain", "scaffold")
    )
    assert plain > 1e-3
    assert scaffold < 1e-6


def test_scaffold_is_its_equations(tmp_path):
    settings = lowrank(*QUADRATIC, "objective.name=scaffold", "server.cohort=2", "server.rounds=6")
    problem, c, own = Quadratics(settings), np.zeros((6, 6)), np.zeros((6, 6, 6))
    for t in range(6):
        cohort, W = problem.cohort(t), problem.W
        ends = [problem.end(k, W, shift=c - own[k]) for k in cohort]
        after = [own[k] - c + (W - end) / (problem.steps * problem.lr) for k, end in zip(cohort, ends)]
        problem.W = np.mean(ends, axis=0)
        c = c + sum(new - own[k] for k, new in zip(cohort, after)) / 6
        own[cohort] = after
    out = rayfed.run(settings, out=tmp_path / "run").out
    close(trained(out), problem.W, 1e-5)
    close(state(out)["objective.c"].numpy().reshape(-1)[-36:], c.reshape(-1), 1e-4)


def test_fedbc_is_its_equations(tmp_path):
    own = ("server.weights=auto", "server.cohort=3", "server.rounds=5", *OBJECTIVES["fedbc"])
    settings = lowrank(*QUADRATIC, *own)
    problem, lam, gamma = Quadratics(settings), np.zeros(6), np.full(6, 0.01)
    for t in range(5):
        cohort, z = problem.cohort(t), problem.W
        ends = {k: problem.end(k, z, pull=2 * lam[k]) for k in cohort}
        for k, end in ends.items():
            before = lam[k]
            lam[k] = max(0.0, lam[k] + 0.5 * (np.square(end - z).sum() - gamma[k]))
            gamma[k] += 0.5 * before
        problem.W = sum(lam[k] * end for k, end in ends.items()) / sum(lam[k] for k in cohort)
    out = rayfed.run(settings, out=tmp_path / "run").out
    close(trained(out), problem.W, 1e-5)
    for client, numbers in stored(out).items():
        close(numbers.double().numpy(), [lam[client], gamma[client]], 1e-4)


def test_where_no_client_of_fedbc_has_a_weight_the_mean_is_plain(tmp_path):
    own = ("server.weights=uniform", "server.rounds=2")
    plain = rayfed.run(lowrank(*own), out=tmp_path / "plain").out
    fedbc = rayfed.run(lowrank(*own, "objective.name=fedbc", "objective.gamma=1e9"), out=tmp_path / "fedbc").out
    assert torch.equal(state(plain)["method.vector"], state(fedbc)["method.vector"])
    assert all(numbers[0] == 0 for numbers in stored(fedbc).values())


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_fedglomo_with_full_gradients_and_all_clients_is_fedavg(tmp_path, beta):
    own = ("client.steps=3", "server.cohort=6", "server.weights=uniform", "server.rounds=5")
    plain = rayfed.run(lowrank(*own), out=tmp_path / "plain").out
    glomo = rayfed.run(lowrank(*own, *OBJECTIVES["fedglomo"], f"objective.beta={beta}"), out=tmp_path / "glomo").out
    close(state(glomo)["method.vector"].numpy(), state(plain)["method.vector"].numpy(), 1e-6)


@pytest.mark.parametrize("vectors", ["one", "two"])
def test_fedglomo_is_its_recursion(tmp_path, vectors):
    own = (*OBJECTIVES["fedglomo"], f"objective.vectors={vectors}", "server.cohort=2", "server.rounds=6")
    settings = lowrank(*QUADRATIC, *own)
    problem, b, u = Quadratics(settings), 0.2, np.zeros((6, 6))
    before = problem.W
    for t in range(6):
        moves = [problem.W - problem.end(k, problem.W) for k in problem.cohort(t)]
        old = [before - problem.end(k, before) for k in problem.cohort(t)]
        news = np.mean([g - gh for g, gh in zip(moves, old)], axis=0)
        u = b * np.mean(moves, axis=0) + (1 - b) * u + (1 - b) * news if t else np.mean(moves, axis=0)
        before, problem.W = problem.W, problem.W - u
    result = rayfed.run(settings, out=tmp_path / "run")
    close(trained(result.out), problem.W, 1e-5)
    vector = HEADER + 4 * 36
    assert [record["bytes/up"] // vector for record in result.metrics] == [2] + 5 * [2 if vectors == "one" else 4]
    assert [record["bytes/down"] // vector for record in result.metrics] == [2] + 5 * [4]


MESSAGES = {  # payloads of a client beside the adapter, by direction and number of values, in every round but the first
    "scaffold": {"down": [36], "up": [36]},
    "fedbc": {"down": [], "up": [1]},
    "fedglomo": {"down": [36], "up": []},
}


@every_objective
def test_every_message_is_in_the_ledger(tmp_path, name):
    """W (6, 6) trains. Both ends know the other entries of the adapter, and these do not travel."""
    result = rayfed.run(lowrank(*QUADRATIC, *OBJECTIVES[name], "server.weights=auto"), out=tmp_path / "run")
    table = pq.read_table(result.out / "ledger.parquet").to_pylist()
    for record in result.metrics:
        first = record["round"] == 1
        for way in ("down", "up"):
            beside = [] if first and way == "down" else MESSAGES[name][way]
            rows = [row for row in table if row["round"] == record["round"] and row["direction"] == way]
            assert sorted(row["values"] for row in rows) == sorted([36, *beside] * 2)
            assert all(row["bytes"] == HEADER + 4 * row["values"] for row in rows)
            assert record[f"bytes/{way}"] == sum(row["bytes"] for row in rows)


def test_only_what_a_client_uploads_travels_beside(tmp_path):
    """FFA-LoRA's frozen A is in no vector."""
    own = ("method.name=ffa_lora", *OBJECTIVES["scaffold"], "server.rounds=2")
    result = rayfed.run(lowrank(*own), out=tmp_path / "run")
    table = pq.read_table(result.out / "ledger.parquet").to_pylist()
    assert {row["values"] for row in table} == {12}
    vectors = stored(result.out).values()
    assert all(int((vector != 0).sum()) == 12 for vector in vectors)


@pytest.mark.parametrize(
    ("wire", "up", "down"),
    [
        (("wire.up.density=0.4",), (9, 36), (24, 96)),  # of 24 entries, and their bytes
        (("wire.up.values=int8", "wire.down.values=bf16"), (24, 28), (24, 48)),
        (("wire.up.values=qsgd4", "wire.down.values=qsgd8"), (24, 16), (24, 28)),
    ],
    ids=["sparse", "rounded", "qsgd"],
)
def test_scaffolds_c_stays_the_mean_of_what_the_clients_store(tmp_path, wire, up, down):
    own = ("server.rounds=8", "method.name=flasc", "server.optimizer=fedavg")
    result = rayfed.run(lowrank(*own, *OBJECTIVES["scaffold"], *wire), out=tmp_path / "run")
    found = stored(result.out)
    assert len(found) > 2
    total = sum(vector.double() for vector in found.values())
    torch.testing.assert_close(state(result.out)["objective.c"].double(), total / 6, rtol=1e-5, atol=1e-7)
    assert total.norm() > 0.01
    for row in pq.read_table(result.out / "ledger.parquet").to_pylist():
        assert (row["values"], row["bytes_values"]) == (up if row["direction"] == "up" else down)


def test_a_dropped_client_sends_nothing_and_stays_as_it_was(tmp_path):
    """The limit is between the changes of the clients."""
    settings = (*OBJECTIVES["scaffold"], "server.cohort=6", "server.rounds=3", "client.on_divergence=drop")
    result = rayfed.run(lowrank(*settings, "client.max_change=0.04"), out=tmp_path / "run")
    diverged = [record["clients/diverged"] for record in result.metrics]
    assert all(0 < dropped < 6 for dropped in diverged)
    assert len(stored(result.out)) < 6
    table = pq.read_table(result.out / "ledger.parquet").to_pylist()
    for record, dropped in zip(result.metrics, diverged):
        up = [row for row in table if row["round"] == record["round"] and row["direction"] == "up"]
        assert len(up) == 2 * (6 - dropped)
    total = sum(vector.double() for vector in stored(result.out).values())
    torch.testing.assert_close(state(result.out)["objective.c"].double(), total / 6, rtol=1e-5, atol=1e-7)


OWN = '''"""Counts a client's rounds and those of all clients, and sends them as numbers."""
from dataclasses import dataclass

import torch

from rayfed.objectives import Message, Stateful


@dataclass(frozen=True)
class Count(Stateful):
    def send(self, state):
        return Message(numbers=state.get("all", torch.zeros(3)))

    def message(self, client, trained, steps, twin=None):
        own = 0.0 if client.stored is None else float(client.stored[0])
        assert len(client.received.numbers) == 3
        return Message(numbers=torch.tensor([own + 1, steps]))

    def store(self, client, sent):
        return sent.numbers

    def absorb(self, state, received, start, population):
        last = state.get("all", torch.zeros(3))
        return {"all": last + torch.tensor([received.clients, sum(float(n[1]) for n in received.numbers), population])}
'''


def test_an_objective_of_ones_own_sends_numbers_both_ways(tmp_path, monkeypatch):
    (tmp_path / "own_count.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    settings = lowrank("objective.name=own_count:Count")
    result = rayfed.run(settings, out=tmp_path / "run")
    assert state(result.out)["objective.all"].tolist() == [2 * 4, 2 * 4 * 2, 6 * 4]
    plan = prepare(settings)
    drawn = [int(client) for t in range(4) for client in cohort_of(plan, t)]
    assert {client: int(own[0]) for client, own in stored(result.out).items()} == {k: drawn.count(k) for k in drawn}
    plain = rayfed.run(lowrank(), out=tmp_path / "plain")
    assert torch.equal(state(result.out)["method.vector"], state(plain.out)["method.vector"])
    for with_numbers, without in zip(result.metrics, plain.metrics, strict=True):
        assert with_numbers["bytes/down"] - without["bytes/down"] == 2 * (HEADER + 12)
        assert with_numbers["bytes/up"] - without["bytes/up"] == 2 * (HEADER + 8)


@every_objective
def test_a_resume_and_other_packs_change_nothing(tmp_path, name):
    own = (*OBJECTIVES[name], "client.steps=3", "client.batch_size=3", "server.cohort=3")
    whole = rayfed.run(lowrank(*own), out=tmp_path / "whole").metrics
    rayfed.run(lowrank(*own, "server.rounds=2"), out=tmp_path / "cut")
    again = rayfed.run(lowrank(*own), out=tmp_path / "cut", resume=True).metrics
    assert [record["state/chain"] for record in again] == [record["state/chain"] for record in whole]
    packs = rayfed.run(lowrank(*own, "engine.pack=1"), out=tmp_path / "packs").metrics
    for one, three in zip(packs, whole, strict=True):
        assert one["eval/gap"] == pytest.approx(three["eval/gap"], rel=1e-4)
        assert one["bytes/total"] == three["bytes/total"]
    files = list((tmp_path / "whole" / "clients").rglob("*.safetensors"))
    assert bool(files) == (name != "fedglomo")
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "whole").rglob("checkpoint.json")]
    needed = {(str(client), round) for found in manifests for client, round, _ in found["objective_clients"]}
    assert {(path.parent.name, int(path.stem.removeprefix("objective-"))) for path in files} == needed
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if files:
        with pytest.raises(rayfed.UserError, match="is damaged"):
            rayfed.run(lowrank(*own), out=tmp_path / "whole", resume=True)


@pytest.mark.slow
@every_objective
def test_in_this_process_and_on_ray_with_a_head_and_sparse_uploads(tiny, tmp_path, ray_cluster, name):
    sparse = () if name == "fedglomo" else ("wire.up.density=0.3",)
    settings = (
        *OBJECTIVES[name], *sparse, "method.name=fedit", "client.momentum=0.0", "server.rounds=4", "engine.pack=2",
    )  # fmt: skip
    here = rayfed.run(tiny(*settings), out=tmp_path / "here").metrics
    there = rayfed.run(tiny(*settings, "engine.kind=ray", "engine.workers=2"), out=tmp_path / "there").metrics
    assert [record["state/chain"] for record in there] == [record["state/chain"] for record in here]
