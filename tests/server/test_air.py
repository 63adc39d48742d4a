"""Runs over the air: what is analog and what is digital, truncated channels, and what does not go together."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from small_runs import lowrank

import rayfed
from rayfed import wire
from rayfed.api import prepare
from rayfed.api.plans import build_components
from rayfed.channels import OverTheAir
from rayfed.errors import UserError
from rayfed.methods import METHODS, build

AIR = ("channel.kind=over_the_air", "server.cohort=4", "engine.pack=2")
SIDE = wire.HEADER_BYTES + 8  # two numbers


def run(path, *settings):
    return rayfed.run(lowrank(*AIR, *settings), out=path)


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "rolora"])
def test_without_noise_it_is_the_lossless_channel(tmp_path, method):
    same = (f"method.name={method}", "server.rounds=2")
    air = run(tmp_path / "air", *same, "channel.noise=0").metrics
    plain = rayfed.run(lowrank(*same, *AIR[1:]), out=tmp_path / "plain").metrics
    for one, other in zip(air, plain, strict=True):
        assert one["eval/loss"] == pytest.approx(other["eval/loss"], rel=1e-5)
        assert one["channel/uses"] == other["params/up"] / 4  # for the whole cohort
        assert one["bytes/up"] == 4 * SIDE
        assert one["bytes/down"] == other["bytes/down"] + 4 * SIDE
        assert (one["params/up"], one["channel/truncated"], one["clients/ok"]) == (8, 0, 4)


def test_noise_grows_with_a_lower_snr(tmp_path):
    exact, *noisy = (
        run(tmp_path / name, name, "server.rounds=1").metrics[0]["eval/loss"]
        for name in ("channel.noise=0", "channel.snr=40", "channel.snr=0")
    )
    assert 0 < abs(noisy[0] - exact) < abs(noisy[1] - exact)


def test_clients_with_a_weak_channel_do_not_take_part(tmp_path):
    """The others' weights are divided by their own sum: without noise, the round is one without these clients."""
    limit = "channel.truncation=0.5"
    result = run(tmp_path / "run", "channel.noise=0", limit, "server.cohort=6", "server.rounds=1")
    plan = prepare(lowrank(*AIR, "channel.noise=0", limit))
    assert isinstance(plan.channel, OverTheAir)
    strong = [k for k in range(6) if abs(plan.channel.fading(0, k)) ** 2 >= 0.5]
    (record,) = result.metrics
    assert 0 < len(strong) < 6
    assert (record["clients/ok"], record["channel/truncated"]) == (len(strong), 6 - len(strong))
    rows = pq.read_table(result.out / "ledger.parquet").to_pandas().query("direction == 'up'")
    assert sorted(rows.client) == strong
    assert set(rows.bytes) == {SIDE}


def test_a_round_in_which_nobody_sends_changes_nothing(tmp_path):
    result = run(tmp_path / "run", "channel.noise=1", "channel.truncation=1000", "server.rounds=2")
    for record in result.metrics:
        assert (record["channel/uses"], record["channel/eta"], record["bytes/up"]) == (0, None, 0)
        assert record["eval/gap"] == 1


def test_weights_by_losses_go_with_it(tmp_path):
    fair = ("server.weights=chebyshev", "weighting.eps=1", "channel.noise=0", "server.rounds=1")
    record = run(tmp_path / "run", *fair).metrics[0]
    lossless = rayfed.run(lowrank(*AIR[1:], *fair[:2], fair[3]), out=tmp_path / "lossless").metrics[0]
    assert record["bytes/up"] == 4 * SIDE + 4 * (wire.HEADER_BYTES + 4)
    assert record["eval/loss"] == pytest.approx(lossless["eval/loss"], rel=1e-6)


REFUSED = {
    "wire.up.density": (("wire.up.density=0.5",), "got 0.5, but over the air all clients send the same entries"),
    "wire.up.values": (("wire.up.values=qsgd4",), "got 'qsgd4', but over the air the values are analog"),
    "profiles.kind": (("method.name=ffa_lora", "profiles.kind=tiers", "profiles.ranks=[1,2]"), "got 'tiers', but over"),
    "server.optimizer": (("server.optimizer=fedavgm",), "got 'fedavgm', but over the air the channel's noise would"),
    "eval.diagnostics": (("eval.diagnostics=true",), "got True, but over the air the server sees no client's model"),
    "server.weights": (("server.weights=norm",), "got 'norm', but over the air the server sees no client's change"),
    "objective.name": (("objective.name=fedbc",), "got 'fedbc', but its clients send more than their change"),
    "privacy.kind": (
        ("privacy.kind=user", "privacy.noise_multiplier=0", "client.on_divergence=drop"), "got 'user', but over the"
    ),
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(field):
    settings, says = REFUSED[field]
    with pytest.raises(UserError) as refused:
        build_components(lowrank(*AIR, "channel.snr=10", *settings))
    assert str(refused.value).startswith(f"{field}: {says}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_need_more_than_one_sum_are_refused(name):
    method, settings = build(name), lowrank(*AIR, "channel.snr=10", f"method.name={name}", "server.optimizer=fedavg")
    if method.summed == "changes" and not method.personal:
        assert build_components(settings).channel.analog
        return
    with pytest.raises(UserError, match=rf"channel\.kind: got 'over_the_air', but {name} cannot use .*; taken by fed_"):
        build_components(settings)
