"""The mean model of a graph, against the mean of the clients' models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runs import lowrank

from rayfed.api import prepare
from rayfed.lora.adapter import Adapter, LowRank
from rayfed.methods import METHODS, matrix, method_class
from rayfed.topologies import OwnModels, columns_of


@pytest.mark.parametrize("name", [name for name in METHODS if method_class(name).mixing])
def test_it_is_their_mean_exactly_where_the_method_says_so(name: str) -> None:
    plan = prepare(lowrank(f"method.name={name}", "topology.kind=graph", "server.cohort=6"))
    method, draw = plan.method, torch.Generator().manual_seed(0)
    assert isinstance(method, OwnModels)
    first = method.init(plan.start(), plan.seed)
    size = len(first.clients[0]["x"])
    clients = {client: {"x": torch.randn(size, generator=draw)} for client in range(6)}
    state, consensus = method.mean_state(first, clients)
    products = []
    for client in range(6):
        start = method.broadcast(state, replace(method.profile, client=client))
        products.append(start.layout.unflatten(start.vector).layers["layer"].dense())
    error = float((matrix(method.delta(state, "layer")) - torch.stack(products).mean(0)).abs().max())
    assert (error < 1e-5) == (method_class(name).mixing == "exact")
    x = torch.stack([own["x"] for own in clients.values()]).double()
    spread = (x - x.mean(0)).square().sum(1).mean() / x.mean(0).square().sum()
    assert consensus == pytest.approx(float(spread), rel=1e-12)


def test_nobody_has_moved_at_the_start_and_a_mean_of_zero_has_no_relative_error() -> None:
    plan = prepare(lowrank("method.name=fed_sb", "topology.kind=graph", "server.cohort=6"))
    method = plan.method
    assert isinstance(method, OwnModels)
    state = method.init(plan.start(), plan.seed)
    assert not state.clients[5]["x"].any()  # the core is 0
    assert method.mean_state(state, state.clients)[1] is None


def test_columns_are_those_of_B_or_of_the_core() -> None:
    B, A = torch.zeros(3, 2), torch.zeros(2, 4)
    pair, cored = LowRank(B, A, 1.0), LowRank(B, A, 1.0, torch.zeros(2, 2))
    layout = Adapter({"a": pair, "b": cored}, {"head": torch.zeros(5)}).layout
    found = layout.unflatten(columns_of(layout))
    assert found.layers["a"].B.tolist() == [[0, 1]] * 3
    assert found.layers["b"].R is not None
    assert found.layers["b"].R.tolist() == [[2, 3]] * 2
    others = (found.layers["a"].A, found.layers["b"].A, found.layers["b"].B, found.head["head"])
    assert all(bool((part == -1).all()) for part in others)
