"""What every algorithm on a graph promises: a file in rayfed/topologies/ is tested by being there."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from quadratics import CLIENTS, RING, SIZE, Quadratics
from small_runs import lowrank

import rayfed
from rayfed.config import Experiment
from rayfed.config.describe import format_value
from rayfed.config.options import options_of
from rayfed.objectives import OBJECTIVES
from rayfed.topologies import ALGORITHMS, build

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "topologies.md").read_text(encoding="utf-8")
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@every_algorithm
def test_it_is_plain_data_that_allows_known_objectives(name: str) -> None:
    found = build(name)
    assert pickle.loads(pickle.dumps(found)) == found == build(name)
    assert hash(found) == hash(build(name))
    assert "plain" in found.objectives
    assert set(found.objectives) <= set(OBJECTIVES)


@every_algorithm
def test_a_round_changes_nothing_in_place_and_keeps_what_is_stored(name: str) -> None:
    found, draw = build(name), torch.Generator().manual_seed(0)
    own = {key: torch.randn(CLIENTS, SIZE, generator=draw, dtype=torch.float64) for key in found.vectors}
    before = {key: values.clone() for key, values in own.items()}
    network = Quadratics(RING, 2, 0.5)
    after = found.round(own, network)
    assert network.exchanges == found.exchanges
    assert set(after) == set(found.vectors) >= {"x"}
    for key, values in before.items():
        assert torch.equal(own[key], values)
        assert after[key].shape == values.shape
        assert after[key].dtype == values.dtype


@every_algorithm
def test_the_setting_and_the_page_have_it_with_every_option(name: str) -> None:
    described = Experiment.model_fields["topology"].annotation.model_fields["algorithm"].description
    assert f"`{name}`" in described
    section = PAGE.split(f"\n### {name}\n")[1].split("\n## ")[0]
    for option, found in options_of(type(build(name))).items():
        assert f"- `topology.{option}` (default `{format_value(found.default, quotes=False)}`): " in section


def test_an_algorithm_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only averages, at a weight of its own; some rounds have no active client."""
    lines = (
        "from dataclasses import dataclass\n"
        "from rayfed.topologies import Algorithm\n"
        "@dataclass(frozen=True)\n"
        "class Lazy(Algorithm):\n"
        "    share: float = 0.5\n"
        "    def round(self, own, network):\n"
        "        x = own['x'] - network.lr * network.gradients(own['x'], 0)\n"
        "        return {'x': (1 - self.share) * x + self.share * network.exchange(x)}\n"
    )
    (tmp_path / "lazy_gossip.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("topology.kind=graph", "topology.algorithm=lazy_gossip:Lazy", "topology.share=0.25", "method.name=fed_sb")
    more = ("server.sampling=poisson", "server.cohort=1", "server.rounds=6", "partition.clients=3")
    metrics = rayfed.run(lowrank(*own, *more), out=tmp_path / "run").metrics
    numbers = [record["clients/ok"] for record in metrics]
    assert 0 in numbers
    assert max(numbers) > 1
    assert metrics[-1]["eval/gap"] < 1
    for before, record in pairwise(metrics):
        assert (record["eval/gap"] == before["eval/gap"]) == (record["clients/ok"] == 0)
