"""Runs under each objective: with mixed ranks and sparse messages, in any packs, in this process and on Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_runs import lowrank

import rayfed
from rayfed.errors import UserError

OBJECTIVES = {
    "fedprox": ("objective.name=fedprox", "objective.mu=5.0"),
    "fedlc": ("objective.name=fedlc",),
    "fedga": ("objective.name=fedga", "server.weights=uniform"),
}
MIXED = (
    "method.name=fedhl", "profiles.kind=tiers", "profiles.ranks=[1,2,4]", "wire.down.density=0.5",
    "wire.up.density=0.3", "partition.alpha=0.1", "client.epochs=3",
)  # fmt: skip
PULL = '''"""A pull towards zero."""
from dataclasses import dataclass

import rayfed


@dataclass(frozen=True)
class Pull(rayfed.Objective):
    strength: float = 1.0

    def gradient(self, values, start):
        return self.strength * values
'''


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    return rayfed.run(tiny(*MIXED, "server.rounds=1"), out=tmp_path_factory.mktemp("plain") / "run").metrics


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packs_change_nothing_but_the_rounding(tiny, tmp_path, plain, name):
    settings = (*MIXED, *OBJECTIVES[name], "server.rounds=1")
    (one,), (three,) = (
        rayfed.run(tiny(*settings, f"engine.pack={size}"), out=tmp_path / f"{size}").metrics for size in (1, 3)
    )
    assert three["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
    assert three["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-3)
    assert abs(one["train/loss"] - plain[0]["train/loss"]) > 1e-3
    assert one["bytes/down"] == plain[0]["bytes/down"]  # an objective sends nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_in_this_process_and_on_ray(tiny, tmp_path, ray_cluster, name):
    settings = (*MIXED, *OBJECTIVES[name], "server.rounds=3", "engine.pack=2")
    here = rayfed.run(tiny(*settings), out=tmp_path / "here").metrics
    there = rayfed.run(tiny(*settings, "engine.kind=ray", "engine.workers=2"), out=tmp_path / "there").metrics
    assert [record["state/chain"] for record in there] == [record["state/chain"] for record in here]


def test_an_objective_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_pull.py").write_text(PULL)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("objective.name=own_pull:Pull", "server.rounds=1")
    try:
        weak, strong = (
            rayfed.run(lowrank(*own, f"objective.strength={s}"), out=tmp_path / s).metrics[0] for s in ("0.0", "9.0")
        )
        with pytest.raises(UserError, match=r"^objective\.strenth: own_pull:Pull has no such option; did you mean"):
            rayfed.run(lowrank(*own, "objective.strenth=1.0"), out=tmp_path / "wrong")
    finally:
        sys.modules.pop("own_pull", None)
    assert (
        weak["state/digest"]
        == rayfed.run(lowrank("server.rounds=1"), out=tmp_path / "plain").metrics[0]["state/digest"]
    )
    assert strong["state/digest"] != weak["state/digest"]
