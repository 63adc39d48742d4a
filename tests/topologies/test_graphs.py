"""Graphs: numbers of neighbours, keyed edges, and weights that keep the mean, also among the active clients alone."""

from __future__ import annotations

import numpy as np
import pytest

from rayfed.errors import UserError
from rayfed.topologies import Graph, make_graph, metropolis

IDS = [3, 5, 8, 9, 12, 20, 21, 30, 31, 32, 40, 41]


def matrix(graph: Graph, active: list[int]) -> np.ndarray:
    """W (active, active)."""
    place, W = {client: i for i, client in enumerate(active)}, np.eye(len(active))
    for client, weights in metropolis(graph.among(active)).items():
        for other, weight in weights.items():
            W[place[client], place[other]] = weight
            W[place[client], place[client]] -= weight
    return W


@pytest.mark.parametrize(("kind", "degree"), [("ring", 2), ("torus", 4), ("complete", 11)])
def test_everyone_has_so_many_neighbours(kind: str, degree: int) -> None:
    graph = make_graph(kind, IDS, None, 0)
    assert list(graph.neighbours) == IDS
    assert {len(others) for others in graph.neighbours.values()} == {degree}
    assert all(client in graph.neighbours[other] for client in IDS for other in graph.neighbours[client])
    assert graph.edges == degree * 12


def test_a_ring_of_two_has_one_pair_and_a_torus_is_as_square_as_can_be() -> None:
    assert make_graph("ring", [4, 7], None, 0).neighbours == {4: (7,), 7: (4,)}
    assert make_graph("torus", IDS, None, 0).neighbours[3] == (5, 9, 12, 31)  # 3 rows of 4
    assert make_graph("complete", IDS, None, 0).spectral_gap() == pytest.approx(1)
    assert make_graph("ring", IDS, None, 0).spectral_gap() == pytest.approx(2 / 3 * (1 - np.cos(np.pi / 6)))


def test_random_edges_are_keyed_by_the_seed() -> None:
    graph = make_graph("erdos_renyi", IDS, 0.4, 1)
    assert graph == make_graph("erdos_renyi", IDS, 0.4, 1) != make_graph("erdos_renyi", IDS, 0.4, 2)
    many = make_graph("erdos_renyi", range(400), 0.1, 0)
    assert many.edges == pytest.approx(400 * 399 * 0.1, rel=0.05)
    assert make_graph("erdos_renyi", IDS, 1.0, 0) == make_graph("complete", IDS, None, 0)


@pytest.mark.parametrize("kind", ["ring", "torus", "erdos_renyi", "complete"])
@pytest.mark.parametrize("active", [IDS, IDS[::2], IDS[:5], IDS[:1]])
def test_weights_are_doubly_stochastic(kind: str, active: list[int]) -> None:
    W = matrix(make_graph(kind, IDS, 0.5, 0), active)
    assert (W >= 0).all()
    assert (np.diag(W) > 0).all()
    np.testing.assert_allclose(W, W.T, atol=0)
    np.testing.assert_allclose(W.sum(0), 1, atol=1e-15)


@pytest.mark.parametrize(
    ("kind", "ids", "probability", "says"),
    [
        ("ring", [3], None, "topology.graph: got 'ring', but 1 clients hold data, and a graph has from 2 to 10000"),
        ("ring", range(10_001), None, "topology.graph: got 'ring', but 10001 clients hold data, and a graph has"),
        ("torus", IDS[:10], None, "topology.graph: got 'torus', but 10 clients hold data, and a torus needs a product"),
        ("erdos_renyi", IDS, 0.01, "topology.edge_probability: got 0.01, but the graph that seed=0 draws is not conn"),
        ("complete", range(2000), None, "topology.graph: got 'complete', but 2000 clients make about 3998000 messages"),
    ],
)
def test_a_graph_that_cannot_be_is_refused(kind: str, ids: list[int], probability: float | None, says: str) -> None:
    with pytest.raises(UserError) as refused:
        make_graph(kind, ids, probability, 0)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
