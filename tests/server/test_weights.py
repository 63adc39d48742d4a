"""Runs with weights from statistics of the cohort: what travels, which weights follow, and packs change nothing."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import lowrank

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.api.plans import build_components
from rayfed.engine.local_executor import LocalExecutor
from rayfed.errors import RunError, UserError
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import METHODS, Method, Profile, Update, build, change_norm, method_class, product_change
from rayfed.server.base_updates import BaseUpdates
from rayfed.server.downlink import Downlink
from rayfed.server.optimizers import ServerOptimizer
from rayfed.server.star import RoundLog, train_round
from rayfed.weighting import build as build_weighting
from rayfed.weighting.chebyshev import box

WEIGHTS = {
    "norm": ("server.weights=norm",),
    "bound": ("server.weights=bound", "weighting.direction=inverse"),
    "chebyshev": ("server.weights=chebyshev", "weighting.eps=0.3"),
}
SCALARS = {"norm": 0, "bound": 3, "chebyshev": 1}
MIXED = (
    "method.name=fedview", "profiles.kind=tiers", "profiles.ranks=[1,2,4]", "wire.down.density=0.5",
    "wire.up.density=0.3", "partition.alpha=0.1", "server.rounds=1",
)  # fmt: skip


def updates_of(experiment, t: int = 0) -> list[Update]:
    """The updates that the method gets in a round that begins with the first state, one client a pack."""
    plan, seen = prepare(experiment), []
    aggregate = type(plan.method).aggregate

    def see(self, state, updates, advance):
        seen.extend(updates)
        return aggregate(self, state, seen, advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plan.method), "aggregate", see)
        patch.setattr(type(plan.method), "sum_in_worker", False)
        executor = LocalExecutor(plan)
        state, log = plan.method.init(plan.start(), plan.seed), RoundLog(t + 1, wire.Ledger(), BaseUpdates())
        packs = [[plan.profiles.profile(c, int(plan.federation.sizes[c]), t)] for c in range(4)]
        downlink, optimizer = Downlink(plan, state, t, executor), ServerOptimizer("fedavg", plan.server)
        train_round(plan, state, t, packs, optimizer, downlink, executor, log)
        executor.close()
    return seen


def shares(updates: list[Update]) -> list[float]:
    weights = np.array([update.weight for update in updates])
    return (weights / weights.sum()).tolist()


@pytest.mark.parametrize("method", ["fedit", "flexlora"])
def test_norm_measures_where_the_method_averages(method):
    found = updates_of(lowrank(f"method.name={method}", "server.weights=norm"))
    flat = [float(update.change.double().norm()) for update in found]
    products = [
        math.sqrt(sum(float(pair.dense().double().norm()) ** 2 for pair in product_change(update).values()))
        for update in found
    ]
    norms, others = (products, flat) if method == "flexlora" else (flat, products)
    assert shares(found) == pytest.approx((np.array(norms) / sum(norms)).tolist(), rel=1e-5)
    assert shares(found) != pytest.approx((np.array(others) / sum(others)).tolist(), rel=1e-3)


def test_the_norm_of_a_change_counts_b_under_the_scale_of_the_server():
    adapter = Adapter({"layer": LowRank(torch.zeros(5, 2), torch.ones(2, 4), 3.0)}, {})
    change = torch.arange(adapter.layout.size, dtype=torch.float32)
    update = Update(Profile(0, 2, 3.0), 1.0, adapter.flatten(), change, adapter.layout)
    in_B = adapter.layout.mask("B")
    expected = math.hypot(3.0 / 1.5 * float(change[in_B].norm()), float(change[~in_B].norm()))
    assert change_norm(update, "changes", 1.5) == pytest.approx(expected, rel=1e-6)
    assert change_norm(update, "changes", 3.0) == pytest.approx(float(change.norm()), rel=1e-6)


def row_losses(plan, client: int, change: torch.Tensor | None = None) -> np.ndarray:
    """The mean squared error of each of a client's rows, under the first adapter and a change of it, by hand."""
    adapter = plan.start()
    vector = adapter.flatten() if change is None else adapter.flatten() + change
    (pair,) = adapter.layout.unflatten(vector).layers.values()
    rows = plan.federation.rows_of(client)
    batch = plan.federation.train.batch(rows, True)
    base = plan.task.load_base(plan.federation).model
    labels = batch.pop("labels")
    (inputs,) = batch.values()
    with torch.no_grad():
        outputs = inputs @ (base.layer.weight + pair.dense()).T
    sums, counts = plan.task.loss(outputs, labels)
    return (sums.double() / counts).numpy()


def test_losses_are_those_of_the_sent_model_and_of_the_trained_one():
    plan = prepare(lowrank())
    found = updates_of(lowrank("server.weights=chebyshev", "weighting.eps=0.2"))
    before = torch.tensor([row_losses(plan, k).mean() for k in range(4)])
    expected = box(before, torch.full((4,), 0.25, dtype=torch.float64), 0.2)
    assert shares(found) == pytest.approx(expected.tolist(), abs=1e-6)

    found = updates_of(lowrank("server.weights=bound"))
    squares = [np.minimum(row_losses(plan, k, found[k].change), 5.0) ** 2 for k in range(4)]
    sent = torch.tensor([[x.mean(), x.var(), len(x)] for x in squares])
    upper, lower = build_weighting("bound").bounds(sent)
    gaps = upper - lower
    assert shares(found) == pytest.approx((gaps / gaps.sum()).tolist(), rel=1e-4)


def test_fewer_rows_are_measured_where_the_setting_says_so():
    all_rows, some = (updates_of(lowrank("server.weights=bound", f"weighting.rows={most}")) for most in ("null", "3"))
    again = updates_of(lowrank("server.weights=bound", "weighting.rows=3"))
    assert shares(some) == shares(again) != shares(all_rows)
    assert shares(updates_of(lowrank("server.weights=bound", "weighting.rows=100"))) == shares(all_rows)


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_clients_send_for_their_weights_is_in_the_ledger(tmp_path, name):
    runs = {
        which: rayfed.run(lowrank("server.rounds=1", *settings), out=tmp_path / which)
        for which, settings in (("own", WEIGHTS[name]), ("examples", ("server.weights=examples",)))
    }
    own, plain = (runs[which].metrics[0] for which in ("own", "examples"))
    message = wire.HEADER_BYTES + 4 * SCALARS[name] if SCALARS[name] else 0
    assert own["bytes/up"] == plain["bytes/up"] + 2 * message
    assert own["params/up"] == plain["params/up"] + 2 * SCALARS[name]
    assert own["bytes/down"] == plain["bytes/down"]
    rows, others = (
        pq.read_table(runs[which].out / "ledger.parquet").to_pandas().query("direction == 'up'")
        for which in ("own", "examples")
    )
    assert sorted(rows.bytes) == sorted([plain["bytes/up"] // 2] * 2 + ([message] * 2 if message else []))
    assert set(rows.checksum[rows.bytes != message]) == set(others.checksum)  # the pass changes no bit of the training
    assert own["eval/loss"] != plain["eval/loss"]
    assert ("weighting/at_caps" in own) == (name == "bound")


def test_chebyshev_without_a_box_is_fedavg(tmp_path):
    runs = [
        rayfed.run(
            lowrank("method.name=flexlora", "server.rounds=2", *more), out=tmp_path / more[0].split("=")[1]
        ).metrics
        for more in (("server.weights=chebyshev", "weighting.eps=0"), ("server.weights=examples",))
    ]
    for one, other in zip(*runs, strict=True):
        assert one["eval/loss"] == pytest.approx(other["eval/loss"], rel=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_packs_change_nothing_but_the_rounding(tiny, tmp_path, name):
    """With mixed ranks and sparse messages."""
    (one,), (three,) = (
        rayfed.run(tiny(*MIXED, *WEIGHTS[name], f"engine.pack={size}"), out=tmp_path / f"{size}").metrics
        for size in (1, 3)
    )
    assert three["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-3)
    assert three["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
    assert three["bytes/up"] == pytest.approx(one["bytes/up"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WEIGHTS, "air"])
def test_two_workers_give_the_same_bits(tiny, tmp_path, ray_cluster, name):
    own = WEIGHTS.get(name, ("method.name=fedit", "channel.kind=over_the_air", "channel.snr=10.0"))
    settings = (*own, "server.cohort=5", "engine.pack=2", "server.optimizer=fedavg")
    here = rayfed.run(tiny(*settings), out=tmp_path / "here").metrics
    there = rayfed.run(tiny(*settings, "engine.kind=ray", "engine.workers=2"), out=tmp_path / "there").metrics
    assert [record["state/chain"] for record in there] == [record["state/chain"] for record in here]


def test_a_run_goes_on_to_the_same_bits(tmp_path):
    settings = (*WEIGHTS["chebyshev"], "channel.kind=over_the_air", "channel.noise=0.01", "checkpoint.every=1")
    whole = rayfed.run(lowrank(*settings), out=tmp_path / "whole").metrics
    rounds = rayfed.iter_rounds(lowrank(*settings), out=tmp_path / "cut")
    next(rounds), next(rounds)
    rounds.close()
    again = rayfed.run(lowrank(*settings), out=tmp_path / "cut", resume=True).metrics
    assert [record["state/chain"] for record in again] == [record["state/chain"] for record in whole]


OWN = {"fedhl": {"data": "examples"}, "hetlora": {"weighting": "given"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "local"])  # which averages nothing
def test_every_method_takes_weights_of_which_all_but_one_are_zero(tmp_path, name):
    options = [f"method.{key}={value}" for key, value in OWN.get(name, {}).items()]
    mix = ("profiles.kind=tiers", "profiles.ranks=[1,2]") if build(name).mixed_ranks else ()
    alone = ("server.weights=chebyshev", "weighting.eps=1", "server.rounds=2")
    result = rayfed.run(lowrank(f"method.name={name}", *options, *mix, *alone), out=tmp_path / "run")
    assert all(math.isfinite(record["eval/loss"]) for record in result.metrics)
    cls = method_class(name)
    summed = cls.summed if isinstance(cls.summed, str) else None  # a property decides by the options
    assert summed in (None, cls.averages)


REFUSED = {
    "fedhl": (("method.name=fedhl",), "server.weights: got 'norm', but method.name=fedhl does not use these weights"),
    "hetlora": (("method.name=hetlora",), "server.weights: got 'norm', but method.name=hetlora does not use these"),
    "empty": (("server.empty_clients=true",), "server.empty_clients: got true, but the weights are 'norm'"),
    "privacy": (
        ("privacy.kind=user", "privacy.noise_multiplier=0", "client.on_divergence=drop"),
        "server.weights: got 'norm', but with privacy a client's weight may not depend on its data",
    ),
    "options": (("weighting.eps=0.1",), "weighting.eps: norm has no such option"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name):
    settings, says = REFUSED[name]
    with pytest.raises(UserError) as refused:
        build_components(lowrank("server.weights=norm", *settings))
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_a_weighting_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_weights.py").write_text(
        "from rayfed.weighting import Weighting\n\n\n"
        "class Losses(Weighting):\n    needs = 'sent_losses'\n    factor = 1.0\n\n"
        "    def statistics(self, losses):\n        return losses.min()[None]\n\n"
        "    def weights(self, clients, statistics):\n        return self.factor * statistics[:, 0]\n\n\n"
        "class Negative(Losses):\n    factor = -1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = rayfed.run(lowrank("server.weights=own_weights:Losses"), out=tmp_path / "run")
    assert result.rounds == 4
    with pytest.raises(RunError, match=r"server\.weights: Negative\.weights returned \[-.*: they must be finite"):
        rayfed.run(lowrank("server.weights=own_weights:Negative"), out=tmp_path / "negative")


def test_the_default_says_that_weights_count():
    assert not Method.ignores_weights
    assert build("fedhl", data="examples").ignores_weights == ""
