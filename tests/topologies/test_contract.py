"""What every algorithm on a graph promises: a file in rayfed/topologies/ is tested by being there."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from quadratics import CLIENTS, RING, SIZE, Quadratics

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
