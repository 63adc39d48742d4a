"""Runs in which statistics by class travel: bytes, packs, resumes, any method and mixed ranks; local training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import rayfed
from rayfed.api import combinations, prepare
from rayfed.api.plans import build_components
from rayfed.clients.local_training import PackMember, train_pack
from rayfed.clients.own_rows import measured_statistics
from rayfed.clients.trainer import Trainer
from rayfed.errors import UserError
from rayfed.objectives._class_statistics import mean_statistics
from rayfed.server.sampling import cohort_of

HEADER, CLASSES, WIDTH = 31, 4, 32
FEDHPL = ("objective.name=fedhpl", "method.name=local", "partition.alpha=0.1")
FEDIMPRO = ("objective.name=fedimpro", "partition.alpha=0.1")
MIXED = (
    "method.name=fedhl", "profiles.kind=tiers", "profiles.ranks=[1,2,4]", "wire.down.density=0.5",
    "wire.up.density=0.3",
)  # fmt: skip


def state(out: Path) -> dict[str, torch.Tensor]:
    """The objective's tensors in the run's last checkpoint."""
    tensors = load_file(max((out / "checkpoints").iterdir()) / "state.safetensors")
    return {name.removeprefix("objective."): value for name, value in tensors.items() if name.startswith("objective.")}


def own_classes(plan, t: int) -> dict[int, set[int]]:
    """The classes of each client of round ``t``."""
    data = plan.federation
    return {int(client): set(data.train.labels[data.rows_of(client)].tolist()) for client in cohort_of(plan, t)}


def test_every_statistic_is_in_the_ledger(tiny, tmp_path):
    """Up C, the counts, and 2 d numbers of each class that the client has; down the same of what the server knows."""
    settings = tiny(*FEDIMPRO, "server.rounds=3", "eval.every=3")
    result, plan = rayfed.run(settings, out=tmp_path / "run"), prepare(settings)
    table, adapter = pq.read_table(result.out / "ledger.parquet").to_pylist(), plan.start().layout.size
    known: set[int] = set()
    for t, record in enumerate(result.metrics):
        own = own_classes(plan, t)
        assert min(map(len, own.values())) < CLASSES
        for way in ("down", "up"):
            rows = [row for row in table if row["round"] == t + 1 and row["direction"] == way]
            for client, classes in own.items():
                found = sorted(row["values"] for row in rows if row["client"] == client)
                count = 1 + CLASSES + 2 * WIDTH * len(known if way == "down" else classes)
                assert found == ([adapter] if way == "down" and not t else sorted([adapter, count]))
            assert all(row["bytes"] == HEADER + 4 * row["values"] for row in rows)
            assert record[f"bytes/{way}"] == sum(row["bytes"] for row in rows)
        known |= set().union(*own.values())
    assert state(result.out)["counts"].tolist() == [float(label in known) for label in range(CLASSES)]
    assert state(result.out)["means"].shape == state(result.out)["variances"].shape == (CLASSES, WIDTH)


def test_the_first_round_is_plain_training(tiny, tmp_path):
    plain, impro = (
        rayfed.run(tiny("partition.alpha=0.1", f"objective.name={name}"), out=tmp_path / name).metrics
        for name in ("plain", "fedimpro")
    )
    assert impro[0]["eval/loss"] == plain[0]["eval/loss"]
    assert impro[1]["eval/loss"] != plain[1]["eval/loss"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((*FEDIMPRO, *MIXED), id="fedhl"),
        pytest.param((*FEDIMPRO, "method.name=fedex_lora"), id="fedex_lora", marks=pytest.mark.slow),
        pytest.param((*FEDHPL, "eval.clients=true"), id="fedhpl", marks=pytest.mark.slow),
    ],
)
def test_a_resume_and_other_packs_change_nothing(tiny, tmp_path, settings):
    """With mixed ranks and sparse messages, and with a method that moves the base: no entry of an adapter counts."""
    own = (*settings, "server.rounds=3", "eval.every=3")
    whole = rayfed.run(tiny(*own), out=tmp_path / "whole").metrics
    rayfed.run(tiny(*own, "server.rounds=2"), out=tmp_path / "cut")
    again = rayfed.run(tiny(*own), out=tmp_path / "cut", resume=True).metrics
    assert [record["state/chain"] for record in again] == [record["state/chain"] for record in whole]
    alone = rayfed.run(tiny(*own, "engine.pack=1"), out=tmp_path / "alone").metrics
    for one, three in zip(alone, whole, strict=True):
        assert one["train/loss"] == pytest.approx(three["train/loss"], rel=1e-3)
        assert one["bytes/total"] == three["bytes/total"]


def test_a_dropped_client_sends_no_statistics(tiny, tmp_path):
    settings = tiny(*FEDIMPRO, "server.rounds=1", "client.on_divergence=drop", "client.max_change=1e-6")
    result = rayfed.run(settings, out=tmp_path / "run")
    assert result.metrics[0]["bytes/up"] == 0
    assert state(result.out) == {}


def test_a_head_of_several_layers_is_refused(tiny):
    parts = build_components(settings := tiny(*FEDIMPRO))
    spec = SimpleNamespace(head={"classifier.dense.weight": 0, "classifier.dense.bias": 0, "classifier.out.weight": 0})
    with pytest.raises(UserError) as refused:
        combinations.check_head(settings, parts.objective, spec)
    assert str(refused.value).startswith("objective.name: got 'fedimpro', but it needs a head of one linear layer")
    assert "has 2" in str(refused.value)
    assert "\n" not in str(refused.value)


def own_models(out: Path) -> dict[tuple[str, str], torch.Tensor]:
    """The tensors of every client's own model, as its last round left it, by client and name."""
    newest = {path.parent.name: path for path in sorted((out / "clients").glob("*/round-*.safetensors"))}
    return {(client, name): value for client, path in newest.items() for name, value in load_file(path).items()}


def test_fedhpl_sends_logits_in_place_of_adapters(tiny, tmp_path):
    """A message of the method is the header alone."""
    settings = tiny(*FEDHPL, "server.rounds=3", "eval.every=3")
    result, plan = rayfed.run(settings, out=tmp_path / "run"), prepare(settings)
    table = pq.read_table(result.out / "ledger.parquet").to_pylist()
    known: set[int] = set()
    for t, record in enumerate(result.metrics):
        own = own_classes(plan, t)
        for way in ("down", "up"):
            rows = [row for row in table if row["round"] == t + 1 and row["direction"] == way]
            for client, classes in own.items():
                found = sorted(row["values"] for row in rows if row["client"] == client)
                count = 1 + CLASSES + CLASSES * len(known if way == "down" else classes)
                assert found == ([0] if way == "down" and not t else [0, count])
            assert record[f"bytes/{way}"] == sum(HEADER + 4 * row["values"] for row in rows)
        known |= set().union(*own.values())
    assert set(state(result.out)) == {"counts", "means"}


def test_fedhpl_without_its_weight_is_local_training_to_the_bit(tiny, tmp_path):
    own = ("partition.alpha=0.1", "server.rounds=3", "method.name=local", "eval.every=3")
    local = rayfed.run(tiny(*own), out=tmp_path / "local")
    for weight in ("0.0", "1.0"):
        hpl = rayfed.run(
            tiny(*own, "objective.name=fedhpl", f"objective.weight={weight}"), out=tmp_path / f"hpl-{weight}"
        )
        mine, others = own_models(hpl.out), own_models(local.out)
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[key], others[key]) for key in mine) == (weight == "0.0")


def test_a_client_of_local_training_is_alone(tiny, tmp_path):
    """It trains on in each of its rounds, from where its last one left it, whoever else takes part.

    What FedHPL's server has in the end are the mean logits of the models that were trained last.
    """
    own = (*FEDHPL, "objective.weight=0", "partition.clients=3", "server.rounds=2", "eval.every=2")
    plan = prepare(settings := tiny(*own, "server.cohort=3"))
    models = own_models(out := rayfed.run(settings, out=tmp_path / "run").out)
    context, measured = Trainer(plan).context, []
    for client in range(3):
        vector = plan.start().flatten()
        for t in range(2):
            support, rows = torch.ones(len(vector), dtype=torch.bool), plan.federation.rows_of(client)
            member = PackMember(client, plan.start().layout, vector, support, rows)
            vector = train_pack(context, [member], lr=plan.client.lr, t=t)[0].vector
        measured += measured_statistics(context, [replace(member, start=vector)], [vector], CLASSES)
        adapter = plan.start().layout.unflatten(vector)
        for name, pair in adapter.layers.items():
            torch.testing.assert_close(models[str(client), f"A.{name}"], pair.A, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(models[str(client), f"B.{name}"], pair.B, rtol=1e-4, atol=1e-5)
        for name, value in adapter.head.items():
            torch.testing.assert_close(models[str(client), f"head.{name}"], value, rtol=1e-4, atol=1e-5)
    wanted = mean_statistics(None, measured, by_examples=True)
    torch.testing.assert_close(state(out)["means"], wanted.means, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(*FEDIMPRO, *MIXED), FEDHPL], ids=["fedimpro", "fedhpl"])
def test_in_this_process_and_on_ray(tiny, tmp_path, ray_cluster, settings):
    own = (*settings, "server.rounds=3", "engine.pack=2")
    here = rayfed.run(tiny(*own), out=tmp_path / "here").metrics
    there = rayfed.run(tiny(*own, "engine.kind=ray", "engine.workers=2"), out=tmp_path / "there").metrics
    assert [record["state/chain"] for record in there] == [record["state/chain"] for record in here]
