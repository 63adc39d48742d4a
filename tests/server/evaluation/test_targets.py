"""Which models are evaluated: the one sparse model that all clients receive, and the model that each tier decodes."""

from __future__ import annotations

import pytest
import torch

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.engine.local_executor import LocalExecutor
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.targets import tier_models


def downloads(plan, state, executor):
    """The downloads of a round that begins with the state."""
    return Downlink(plan, state, 0, executor)


@pytest.mark.parametrize("scale", ["own", "server"])
def test_truncations_differ_and_the_largest_tier_of_fedhl_is_the_best_approximation(tiny, tmp_path, scale):
    overrides = (
        f"profiles.scale={scale}",
        "method.name=fedhl", "profiles.kind=tiers", "profiles.ranks=[1,2,4]", "eval.tiers=true", "server.rounds=3",
        "client.lr=0.2",
    )  # fmt: skip
    record = rayfed.run(tiny(*overrides), out=tmp_path / "run").metrics[-1]
    losses = [record[f"test/loss_rank_{rank}"] for rank in (1, 2, 4)]
    assert len(set(losses)) == 3
    assert abs(losses[2] - record["test/loss"]) < abs(losses[0] - record["test/loss"])


def test_density_tiers_keep_the_largest_entries(tiny):
    plan = prepare(tiny("profiles.kind=tiers", "profiles.densities_down=[0.25,1.0]", "eval.tiers=true"))
    state = plan.method.init(plan.start(), plan.seed)
    executor = LocalExecutor(plan)
    models = tier_models(plan, state, 0, downloads(plan, state, executor), executor)
    executor.close()
    assert sorted(models) == ["_rank_4", "_rank_4_density_0.25"]
    sparse, _ = models["_rank_4_density_0.25"]
    kept = sparse != 0
    assert int(kept.sum()) == int(0.25 * len(sparse))
    assert torch.equal(sparse[kept], state.vector[kept])
    assert float(state.vector[~kept].abs().max()) <= float(sparse[kept].abs().min())


@pytest.mark.parametrize(("masks", "cut_from"), [("next", 1), ("round", 0)])
def test_tiers_are_measured_under_their_next_masks_or_those_of_the_round(tiny, masks, cut_from):
    tiers = ("profiles.kind=tiers", "profiles.densities_down=[0.25,1.0]", f"eval.tier_masks={masks}")
    plan = prepare(tiny(*tiers))
    before = plan.method.init(plan.start(), plan.seed)
    draw = torch.Generator().manual_seed(0)
    state = before.next(vector=torch.randn(before.vector.shape, generator=draw))
    executor = LocalExecutor(plan)
    models = tier_models(plan, state, 0, downloads(plan, before, executor), executor)
    executor.close()
    kept = wire.top_mask((before, state)[cut_from].vector, 0.25)
    assert torch.equal(models["_rank_4_density_0.25"][0], state.vector * kept)
    assert torch.equal(models["_rank_4"][0], state.vector)


@pytest.mark.parametrize("name", ["flora", "fedview"])
def test_the_change_of_the_base_counts_and_personal_methods_have_no_tiers(tiny, tmp_path, name):
    record = rayfed.run(tiny(f"method.name={name}", "eval.tiers=true"), out=tmp_path / "run").metrics[-1]
    if name == "flora":  # every client has merged the whole change
        assert record["test/loss_rank_4"] == pytest.approx(record["test/loss"], rel=1e-5)
    else:
        assert not any(key.startswith("test/loss_rank") for key in record)


def keys(tiny, tmp_path, *overrides: str) -> set[str]:
    record = rayfed.run(tiny("server.rounds=1", *overrides), out=tmp_path / "run").metrics[-1]
    assert all(record[key] is not None for key in record if key.startswith(("eval/", "test/")) and "recall" not in key)
    return {key.removeprefix("test/accuracy") for key in record if key.startswith("test/accuracy")}


SPARSE, MIXED = "wire.down.density=0.25", ("profiles.kind=tiers", "profiles.densities_down=[0.25,1.0]")


@pytest.mark.parametrize(
    ("overrides", "suffixes"),
    [
        ((), {""}),
        ((SPARSE,), {"", "_masked"}),
        ((SPARSE, "eval.masked=false"), {""}),
        ((SPARSE, "method.name=fedview"), {""}),  # every client has a model of its own
        (("profiles.kind=tiers", "profiles.densities_down=[0.25,0.25]"), {"", "_masked"}),
        (MIXED, {""}),
        ((*MIXED, "eval.tiers=true"), {"", "_rank_4", "_rank_4_density_0.25"}),
        ((SPARSE, "method.name=hetlora", "profiles.kind=tiers", "profiles.ranks=[2,4]"), {""}),
    ],
)
def test_there_are_masked_metrics_only_where_all_clients_receive_one_mask(tiny, tmp_path, overrides, suffixes):
    assert keys(tiny, tmp_path, *overrides) == suffixes


def test_rounds_between_evaluations_are_measured_on_the_same_rows_and_choose_nothing(tiny, tmp_path):
    overrides = ("server.rounds=4", "eval.every=3", "wire.down.density=0.5", "wire.up.density=0.5")
    plain = rayfed.run(tiny(*overrides), out=tmp_path / "plain")
    result = rayfed.run(tiny(*overrides, "eval.subset=10"), out=tmp_path / "subset")
    each = [record.get("eval_subset/accuracy") for record in result.metrics]
    assert [value is not None for value in each] == [True, True, False, False]
    assert all(float(10 * value).is_integer() for value in each[:2])
    assert [record["eval/accuracy"] is None for record in result.metrics] == [True, True, False, False]
    for record, other in zip(result.metrics, plain.metrics, strict=True):
        known = {key: value for key, value in other.items() if "time" not in key}
        assert {key: record[key] for key in known} == known
    assert result.summary == plain.summary


def test_a_subset_of_all_rows_is_the_validation_split(tiny, tmp_path):
    """At a learning rate of almost nothing, the subset's round and the full evaluation after it measure one model."""
    overrides = ("server.rounds=2", "eval.every=2", "eval.subset=10000", "client.lr=1e-30")
    first, last = rayfed.run(tiny(*overrides), out=tmp_path / "run").metrics
    assert first["eval_subset/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    assert first["eval_subset/accuracy"] == last["eval/accuracy"]
