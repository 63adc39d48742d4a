"""A client that diverges: a round without its update is, for every method, the round without the client."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import lowrank

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.clients import trainer
from rayfed.engine.local_executor import LocalExecutor
from rayfed.errors import RunError
from rayfed.methods import METHODS, build
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.diagnostics import Diagnostics
from rayfed.server.optimizers import ServerOptimizer
from rayfed.server.star import RoundLog, train_round

SETTINGS = ("client.on_divergence=drop", "client.steps=1", "method.rounds_sparse=1", "method.rho=0.5")


class Rounds:
    """Single rounds of one method, each from any state. The clients in ``broken`` diverge."""

    def __init__(self, name: str, *overrides: str) -> None:
        mix = ("profiles.kind=tiers", "profiles.ranks=[1,2]") if build(name).mixed_ranks else ()
        own = SETTINGS if name == "slora" else SETTINGS[:2]
        self.plan = prepare(lowrank(f"method.name={name}", *own, *mix, *overrides))
        self.executor = LocalExecutor(self.plan)
        self.broken: frozenset[int] = frozenset()
        self.log: RoundLog
        self.optimizer: ServerOptimizer

    def start(self) -> Any:
        return self.plan.method.init(self.plan.start(), self.plan.seed)

    def play(
        self, state: Any, packs: list[list[int]], broken: set[int], moments: dict[str, Any],
        diagnostics: Diagnostics | None = None,
    ) -> Any:  # fmt: skip
        plan, self.broken, t = self.plan, frozenset(broken), 1
        self.log = RoundLog(t + 1, wire.Ledger(), BaseUpdates(), diagnostics)
        self.optimizer = ServerOptimizer(plan.server_optimizer, plan.server)
        self.optimizer.state = {name: moment.clone() for name, moment in moments.items()}
        profiles = [[plan.profiles.profile(client, 8, t) for client in pack] for pack in packs]
        downlink = Downlink(plan, state, t, self.executor)
        return train_round(plan, state, t, profiles, self.optimizer, downlink, self.executor, self.log)


@pytest.fixture
def rounds(monkeypatch) -> Iterator[Any]:
    """rounds(name, ...) -> `Rounds`."""
    made: list[Rounds] = []
    train_pack = trainer.train_pack

    def train(context, members, **given):
        results = train_pack(context, members, **given)
        bad = [member.client in made[-1].broken for member in members]
        nan = float("nan")
        return [replace(r, vector=r.vector * nan, loss=nan) if b else r for r, b in zip(results, bad, strict=True)]

    def make(name: str, *overrides: str) -> Rounds:
        made.append(Rounds(name, *overrides))
        return made[-1]

    monkeypatch.setattr(trainer, "train_pack", train)
    yield make
    for one in made:
        one.executor.close()


def bits(rounds: Rounds, state: Any) -> dict[str, bytes]:
    tensors = {**state.tensors(), **{f"optimizer.{name}": moment for name, moment in rounds.optimizer.state.items()}}
    for client, own in state.clients.items():
        tensors |= {f"{client}.{name}": tensor for name, tensor in own.items()}
    facts = {"facts": json.dumps([state.facts(), sorted(state.clients)]).encode()}
    return facts | {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_round_without_an_update_is_the_round_without_the_client(rounds, name):
    own = rounds(name)
    begun = own.play(own.start(), [[0], [1], [2], [3]], set(), {})  # every client has a state where the method has any
    moments = own.optimizer.state

    def both(packs: list[list[int]], broken: set[int]) -> tuple[Any, Any]:
        state = own.play(begun, packs, broken, moments)
        assert own.log.diverged.keys() == broken
        assert own.log.ok == 4 - len(broken)
        assert own.log.mean_loss > 0
        found, traffic = bits(own, state), own.log.ledger.totals()
        left = [[client for client in pack if client not in broken] for pack in packs]
        without = own.play(begun, [pack for pack in left if pack], set(), moments)
        expected = own.log.ledger.totals()
        assert traffic["bytes/up"] == expected["bytes/up"] > 0  # a client that was dropped sent nothing
        assert traffic["bytes/down"] > expected["bytes/down"]  # but had received its download
        return (state, found), (without, bits(own, without))

    for packs, broken in (([[0], [1], [2], [3]], {0, 3}), ([[0, 1], [2, 3]], {2, 3})):
        (_, found), (_, wanted) = both(packs, broken)
        assert found == wanted

    (state, _), (without, _) = both([[0, 1], [2, 3]], {1, 2})  # other packs: other rounding
    assert state.clients.keys() == without.clients.keys()
    for layer in own.plan.method.layers(state):
        torch.testing.assert_close(*(dense(own.plan.method.delta(s, layer)) for s in (state, without)))


def dense(change: Any) -> torch.Tensor:
    return change if isinstance(change, torch.Tensor) else change.dense()


@pytest.mark.parametrize("name", METHODS)
def test_a_round_in_which_all_diverge_changes_nothing(rounds, name):
    own = rounds(name)
    begun = own.play(own.start(), [[0, 1], [2, 3]], set(), {})
    moments, before = own.optimizer.state, bits(own, begun)
    assert own.play(begun, [[0, 1], [2]], {0, 1, 2}, moments, Diagnostics()) is begun  # packs are summed by the server
    state = own.play(begun, [[0, 1], [2]], {0, 1, 2}, moments)
    assert state is begun
    assert bits(own, state) == before
    assert (own.log.ok, own.log.mean_loss, own.log.ledger.totals()["bytes/up"]) == (0, None, 0)
    (event,) = own.log.events()
    assert event == (
        "round 2: diverged: client 0 (dropped: training gave values that are not finite), client 1 (dropped: training "
        "gave values that are not finite), client 2 (dropped: training gave values that are not finite); all clients "
        "were dropped, so the global state stays as it was"
    )


def test_an_event_names_a_few_of_many_clients(rounds):
    own = rounds("fedit", "partition.clients=20", "server.cohort=20")
    own.play(own.start(), [list(range(10)), list(range(10, 20))], set(range(7)), {})
    (event,) = own.log.events()
    assert event.count("client ") == 5
    assert event.endswith("client 4 (dropped: training gave values that are not finite), 2 more")


@pytest.mark.parametrize("taken", [0, 1])
def test_a_method_that_stops_early_is_refused_whoever_diverged(rounds, monkeypatch, taken):
    def aggregate(self, state, updates, advance):
        assert len([*itertools.islice(updates, taken)]) == taken
        return state

    own = rounds("fedhl")
    monkeypatch.setattr(type(own.plan.method), "aggregate", aggregate)
    for packs, broken in (([[0], [1], [2]], set()), ([[0], [1], [2]], {2}), ([[0, 1, 2]], {0})):
        with pytest.raises(RunError, match="ended before it took every update"):
            own.play(own.start(), packs, broken, {})


# Whole runs: client 4 has a target that no float32 can be squared of.

BAD = 4
RUN = ("server.rounds=5", "server.cohort=3", "engine.pack=3", "checkpoint.keep=9")


def run(out, *overrides: str, resume: bool = False) -> rayfed.RunResult:
    experiment = lowrank(*RUN, *overrides)
    federation = prepare(experiment).federation
    targets = federation.train.labels.copy()
    targets[federation.rows_of(BAD)[0]] = 3e38
    federation = replace(federation, train=replace(federation.train, labels=targets))
    return rayfed.run(experiment, out=out, resume=resume, federation=federation)


def test_a_run_that_failed_goes_on_without_the_update(tmp_path):
    failure = rf"^round \d, client {BAD}: training gave values that are not finite; lower client\.lr .*--resume with "
    with pytest.raises(RunError, match=failure + r"client\.on_divergence=drop goes on"):
        run(tmp_path / "run")
    resumed = run(tmp_path / "run", "client.on_divergence=drop", resume=True)
    dropping = run(tmp_path / "drop", "client.on_divergence=drop")
    assert [r["state/digest"] for r in resumed.metrics] == [r["state/digest"] for r in dropping.metrics]
    diverged = [record["clients/diverged"] for record in resumed.metrics]
    assert set(diverged) == {0, 1}
    assert [record["clients/ok"] for record in resumed.metrics] == [3 - count for count in diverged]
    assert all(0 < record["train/loss"] < 100 for record in resumed.metrics)
    events = (tmp_path / "run" / "events.log").read_text()
    assert events.count(f"diverged: client {BAD} (dropped: training gave values that are not finite)") == sum(diverged)


@pytest.mark.parametrize("name", ["flora", "rac_lora"])
def test_a_round_that_changes_nothing_publishes_no_base_update(tmp_path, name):
    alone = ("server.cohort=1", "server.rounds=9", "engine.pack=1", "client.on_divergence=drop", f"method.name={name}")
    metrics = run(tmp_path / "run", *alone).metrics
    empty = [record for record in metrics if record["clients/diverged"]]
    assert empty
    assert empty != metrics
    folder = tmp_path / "run" / "checkpoints"
    states = [load_file(path / "state.safetensors") for path in sorted(folder.iterdir())]
    for record in empty:
        assert record["train/loss"] is None
        assert "nonfinite" not in record
        assert not any(key.startswith("method/") for key in record)
        before, after = states[record["round"] - 2 : record["round"]]
        assert all(torch.equal(before[key], after[key]) for key in after)
    checkpoint = json.loads((folder / "round-000009" / "checkpoint.json").read_text())
    assert len(checkpoint["base_updates"]["sizes"]) == 9 - len(empty)


@pytest.mark.parametrize("pack", [1, 3])
def test_a_large_change_is_clipped(tmp_path, pack):
    limit = 1e-3
    clipped = ("client.on_divergence=clip", f"client.max_change={limit}", f"engine.pack={pack}")
    result = rayfed.run(lowrank(*RUN, *clipped), out=tmp_path / "run")
    assert [(r["clients/ok"], r["clients/diverged"]) for r in result.metrics] == [(3, 3)] * 5
    states = [load_file(path / "state.safetensors") for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    for before, after in itertools.pairwise(states):
        assert 0 < float((after["method.vector"] - before["method.vector"]).norm()) <= 1.001 * limit
    assert "(clipped: training gave a change of L2 norm" in (tmp_path / "run" / "events.log").read_text()
